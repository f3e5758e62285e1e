"""Entry points: flags to options, options to work. Nothing below imports this."""
