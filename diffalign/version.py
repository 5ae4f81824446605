"""State the version; modules of this package import it from here, since the package itself imports them.

It is that of the git tag when the package was built or installed. A checkout that is only on Python's path has the version
of the installed package, or none.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("diffalign")
except PackageNotFoundError:
    __version__ = "0+unknown"
