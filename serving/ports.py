"""Where a server listens: its port is taken before the long work, and an address is written as browsers read it."""

import errno
import socket


def url_of(host: str, port: int) -> str:
    """http://127.0.0.1:8000, http://[::1]:8000."""
    return f"http://{bracketed(host)}:{port}"


def bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def take_port(host: str, port: int) -> list[socket.socket]:
    """Sockets that hold a port, one for each address of the host; nobody is let in yet.

    Args:
        port: 0 for any that is free.

    Raises:
        OSError: the host is none of this machine, or the port is in use or not for everybody.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise OSError(f"--host {host}: there is no such address ({error.strerror}).") from error
    taken, missing = [], None
    try:
        for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
            if taken and not port:  # all addresses have the port of the first
                address = (address[0], taken[0].getsockname()[1], *address[2:])
            try:
                taken.append(_bind(family, address))
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # a family that this machine does not speak
                    raise
                missing = error
        if not taken:
            raise missing
    except OSError as error:
        for held in taken:
            held.close()
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"Port {port} of {host} is in use: give another --port, or 0 for one that is free."
            ) from error
        raise OSError(f"Port {port} of {host} cannot be used ({error.strerror}).") from error
    return taken


def _bind(family, address):
    """A socket at the address. Where nothing is left of an earlier server, nobody else can take it."""
    for shared in (False, True):
        taken = socket.socket(family)
        try:
            if family == socket.AF_INET6:
                taken.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if shared:  # with the connections of an earlier server that are still being closed
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            taken.bind(address)
            return taken
        except OSError as error:
            taken.close()
            if shared or error.errno != errno.EADDRINUSE:
                raise
