"""What every answer, card and bundle says of its use."""

NOTICE = "Research use only, not for diagnosis."
