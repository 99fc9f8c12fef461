"""The commands `sffx-viz` and `sffx-export`."""
