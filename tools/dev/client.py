"""What the development commands ask Belfry over HTTP, with nothing but the standard library."""

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any

from tools.dev import CommandError

# Belfry listens on this machine: a proxy that the environment names would only be in the way.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@dataclass(frozen=True)
class Client:
    """Speaks to the Belfry at `address` as the bearer of `token`."""

    address: str
    token: str

    def get(self, path: str) -> Any:
        """The JSON that a GET answers. Raises CommandError for any other answer, and after 30 seconds."""
        return self._send("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a POST answers. Raises CommandError for any other answer, and after 30 seconds."""
        return self._send("POST", path, json.dumps(body).encode())

    def put(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a PUT answers. Raises as `post` does."""
        return self._send("PUT", path, json.dumps(body).encode())

    def patch(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON that a PATCH answers. Raises as `post` does."""
        return self._send("PATCH", path, json.dumps(body).encode())

    def _send(self, method: str, path: str, body: bytes | None) -> Any:
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.address + path, data=body, headers=headers, method=method)
        try:
            with _opener.open(request, timeout=30) as response:
                return json.load(response)
        except urllib.error.HTTPError as error:
            with error:
                text = error.read(2_000).decode(errors="replace")
            raise CommandError(f"{method} {path} answered {error.code}: {text}") from None
        except (OSError, ValueError) as error:
            raise CommandError(f"{method} {path} failed: {error}") from None


def not_ready(address: str) -> str | None:
    """What /readyz says instead of 200; None when it is that.

    Two seconds are enough: a process that dies while it starts leaves the question waiting, not refused.
    """
    try:
        with _opener.open(f"{address}/readyz", timeout=2) as response:
            return None if response.status == 200 else f"it answered {response.status}"
    except urllib.error.HTTPError as error:
        with error:
            return error.read(2_000).decode(errors="replace")
    except OSError as error:
        return str(error)
