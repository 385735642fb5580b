"""What a server gives to viewers: tokens, reconstructions, answers. Knows no server; app/main.py is MONAI Label's."""
