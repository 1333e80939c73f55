"""Servers on a thread: one that hands out the files of a folder, and one of an app of ours."""

import functools
import http.server
import threading
import time
from contextlib import contextmanager


class _Handler(http.server.SimpleHTTPRequestHandler):
    """A folder, in parts where `ranges` says so; `sent` counts the bytes of the answers."""

    def do_GET(self):
        try:
            with open(self.translate_path(self.path), "rb") as file:
                content = file.read()
        except OSError:
            return self.send_error(404)
        wanted = self.headers.get("Range")
        if wanted and self.server.ranges:
            first, last = wanted.removeprefix("bytes=").split("-")
            first, last = int(first), min(int(last or len(content) - 1), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        try:
            for start in range(0, len(content), 2**12):
                self.wfile.write(content[start : start + 2**12])
                self.server.sent += len(content[start : start + 2**12])
        except OSError:  # whoever asked has seen enough
            pass

    def log_message(self, *args):
        pass


@contextmanager
def serve(folder, ranges=True):
    """A server of a folder for a `with` block, with its `url` and the number of bytes `sent`."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=folder))
    server.ranges, server.sent, server.url = ranges, 0, f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_app(app):
    """An app of `uhr_bat.serving` for a `with` block, as its commands serve it; its address."""
    import uvicorn
    from uhr_bat.serving.ports import take_port, url_of
    from uhr_bat.serving.serve import listening

    server = uvicorn.Server(listening(app))
    sockets = take_port("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=(sockets,), daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield url_of(*sockets[0].getsockname())
    finally:
        server.should_exit = True
        thread.join()
