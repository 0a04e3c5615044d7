"""Chest radiographs in, a judged image encoder out."""

__version__ = "0.1.0"
