"""Numbers in, numbers out: errors in HU, codebook use, text and finding scores, controls."""
