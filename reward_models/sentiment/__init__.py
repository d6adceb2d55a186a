"""How the shipped sentiment classifier is made: its data, its teacher, its training and its calibration."""
