"""Without a network a hub name is given up at once, and only then."""

import socket
import sys

import pytest

from qtjax import hub


@pytest.fixture
def online(monkeypatch):
    """No offline switch, no proxy, and libraries whose switches are put back afterwards."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "")
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    for name in ("huggingface_hub.constants", "datasets.config"):
        if name in sys.modules:
            monkeypatch.setattr(sys.modules[name], "HF_HUB_OFFLINE", False)
    return monkeypatch


def _unresolvable(*_):
    raise socket.gaierror(-2, "Name or service not known")


def test_unresolvable_hub_means_offline(online):
    """When the hub's name does not resolve, the client is told so, whether or not it is imported already."""
    import huggingface_hub.constants

    online.setattr(socket, "getaddrinfo", _unresolvable)
    online.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    assert hub.give_up_early()
    assert hub.os.environ["HF_HUB_OFFLINE"] == "1" and huggingface_hub.constants.is_offline_mode()


def test_a_name_that_resolves_stays_online(online):
    """With a name that resolves, of the hub or of its mirror, nothing is changed."""
    asked = []
    online.setattr(socket, "getaddrinfo", lambda host, port: asked.append(host))
    online.setenv("HF_ENDPOINT", "https://mirror.example/hf")
    assert not hub.give_up_early() and asked == ["mirror.example"] and not hub.os.environ["HF_HUB_OFFLINE"]


def test_a_proxy_resolves_names_itself(online):
    """Behind a proxy a name need not resolve here, so nothing is concluded from it."""
    online.setattr(socket, "getaddrinfo", _unresolvable)
    online.setattr(hub.urllib.request, "getproxies", lambda: {"https": "http://proxy"})
    assert not hub.give_up_early()


def test_the_switch_is_respected(online):
    """A user who says offline is believed without a look at the network."""
    online.setenv("HF_HUB_OFFLINE", "1")
    online.setattr(socket, "getaddrinfo", lambda *_: pytest.fail("looked up a name"))
    assert hub.give_up_early()
