"""Who decides inside a network: exits."""
