"""A Hub with data sets as their publishers laid them out: the listing, the files, and what headers the client asks for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """(address, the files that were asked for) of a server of these folders by data set id."""
    taken: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            for name, folder in repositories.items():
                files = sorted(f for f in folder.rglob("*") if f.is_file())
                if path.startswith(f"/api/datasets/{name}/tree/"):
                    return self._json([self._entry(f, folder) for f in files])
                if path.startswith(f"/api/datasets/{name}"):
                    return self._json({"id": name, "sha": COMMIT, "siblings": [{"rfilename": self._name(f, folder)} for f in files]})  # fmt: skip
                if path.startswith(f"/datasets/{name}/resolve/"):
                    place = path.removeprefix(f"/datasets/{name}/resolve/").partition("/")[2]
                    if self.command == "GET":
                        taken.append(f"{name}/{place}")
                    return self._file(folder / place)
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET

        @staticmethod
        def _name(file: Path, folder: Path) -> str:
            return file.relative_to(folder).as_posix()

        def _entry(self, file: Path, folder: Path) -> dict[str, object]:
            return {
                "type": "file",
                "path": self._name(file, folder),
                "size": file.stat().st_size,
                "oid": self._tag(file),
            }

        @staticmethod
        def _tag(file: Path) -> str:
            return hashlib.sha1(file.read_bytes()).hexdigest()

        def _json(self, told: object) -> None:
            self._send(200, json.dumps(told).encode(), {"Content-Type": "application/json"})

        def _file(self, file: Path) -> None:
            self._send(200, file.read_bytes(), {"ETag": f'"{self._tag(file)}"', "X-Repo-Commit": COMMIT})

        def _send(self, status: int, content: bytes, headers: Mapping[str, str]) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", taken
    finally:
        server.shutdown()
        server.server_close()
