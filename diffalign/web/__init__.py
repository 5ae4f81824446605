"""The local web server that pages and services share: Starlette on uvicorn, on loopback unless another host is asked for.

Import this package inside a verb: without Starlette and uvicorn the import itself says in one line what to install.
"""

from diffalign.packages import extras_named

with extras_named("a local server"):
    import python_multipart
    import starlette
    import uvicorn

from diffalign.web.address import Address, new_token
from diffalign.web.app import build_app, page
from diffalign.web.guard import Limits
from diffalign.web.server import Listener, listen, running, serve, show_address

__all__ = [
    "Address",
    "Limits",
    "Listener",
    "build_app",
    "listen",
    "new_token",
    "page",
    "running",
    "serve",
    "show_address",
]

del python_multipart, starlette, uvicorn  # imported to see that they are there
