"""The Hugging Face hub, when it is out of reach: said at once, not after minutes of retries."""

import os
import socket
import sys
import urllib.request
from urllib.parse import urlparse


def give_up_early() -> bool:
    """Tells the hub's client to use its cache only when the hub's name does not resolve. Returns whether it is offline.

    Without this, transformers and datasets try six times per file, half a minute to a minute each, and print
    every attempt. A proxy resolves names by itself, so with one nothing is checked. Call it before asking for a hub name.
    """
    if os.environ.get("HF_HUB_OFFLINE"):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT", "")).hostname or "huggingface.co"
    if urllib.request.getproxies():
        return False
    try:
        socket.getaddrinfo(host, 443)
        return False
    except OSError:
        pass
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Both libraries read the variable once, when they are imported; one that is already here is told directly.
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            sys.modules[name].HF_HUB_OFFLINE = True
    return True
