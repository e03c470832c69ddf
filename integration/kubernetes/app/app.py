# What the tests on a cluster run in pods. It counts, says what it reads, and ends as
# it is told.
import http.server, os, signal, socketserver, threading, time

born = time.monotonic_ns()
count = 0
memory = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global count
        path = self.path
        if path == "/healthz":
            status = 500 if os.path.exists("/tmp/sick") else 200
            return self.answer("", status)
        if path == "/count":
            count += 1
            return self.answer(str(count))
        if path == "/born":
            return self.answer(str(born))
        if path.startswith("/read/"):
            try:
                with open(path[5:]) as f:
                    return self.answer(f.read())
            except OSError as e:
                return self.answer(str(e), 404)
        if path.startswith("/eat/"):
            memory.append(os.urandom(1 << 20) * int(path[5:]))
            return self.answer("eaten")
        self.answer("", 404)

    def answer(self, text, status=200):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


def end(*_):
    print("asked to end", flush=True)
    if os.path.isdir("/host"):
        with open("/host/end-" + os.environ.get("NAME", "app"), "w") as f:
            f.write("in good order")
    os._exit(0)


def tick():
    n = 0
    while True:
        n += 1
        print("tick", n, flush=True)
        if os.path.exists("/tmp/exit"):
            with open("/tmp/exit") as f:
                os._exit(int(f.read()))
        time.sleep(0.2)


class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


signal.signal(signal.SIGTERM, end)
threading.Thread(target=tick, daemon=True).start()
print("started", flush=True)
Server(("", int(os.environ.get("PORT", "8080"))), Handler).serve_forever()
