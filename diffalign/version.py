"""State the version; modules of this package import it from here, since the package itself imports them."""

__version__ = "0.1.0"
