"""Options of the commands, one dataclass for each: a field is a flag, the string under it its help.

Promise: options that exist can work together, as far as that is known before anything is read.
"""
