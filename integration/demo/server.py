# A process with state of many kinds in its memory only: a dictionary of random
# data, a generator, a thread, an open file. It answers one line of JSON for each
# line that it is sent.
import hashlib, json, os, secrets, socketserver, tempfile, threading, time

token = secrets.token_hex(8)
data = {}
file = tempfile.TemporaryFile()
ticks = 0


def generate():
    a, b, step = 0, 1, 0
    while True:
        a, b, step = b, (a + b) % (1 << 61), step + 1
        yield step


generator = generate()


def tick():
    global ticks
    while True:
        time.sleep(0.01)
        ticks += 1


def fill():
    for i in range(100_000):
        data[i] = secrets.token_bytes(32)
    file.write(secrets.token_bytes(12345))
    for _ in range(41):
        next(generator)


def state():
    digest = hashlib.sha256()
    for key, value in data.items():
        digest.update(b"%d" % key + value)
    return {
        "pid": os.getpid(), "token": token, "digest": digest.hexdigest(), "entries": len(data),
        "generated": next(generator), "ticks": ticks, "offset": file.tell(),
    }


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        for line in self.rfile:
            if line.strip() == b"fill":
                fill()
            self.wfile.write(json.dumps(state()).encode() + b"\n")


class Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True


threading.Thread(target=tick, daemon=True).start()
Server(("0.0.0.0", 7000), Handler).serve_forever()
