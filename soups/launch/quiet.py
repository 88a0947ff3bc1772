"""See `soups.fitting.quiet`."""

from soups.fitting.quiet import quiet as quiet
