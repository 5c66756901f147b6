"""Measuring on the machine this runs on."""
