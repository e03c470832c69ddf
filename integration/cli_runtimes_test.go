package integration

import (
	"syscall"
	"testing"

	"github.com/stasis-run/stasis/integration/stack"
)

// javaState answers each line in /ask with one in /answer. Its threads, its random
// generator, a connection to itself, an open file and its collector's heap are in
// the answers.
const javaState = `
import java.io.*;
import java.net.*;
import java.nio.file.*;
import java.util.*;
import java.util.concurrent.*;

public class State {
    public static void main(String[] args) throws Exception {
        var random = new Random();
        var live = new ConcurrentSkipListMap<Integer, byte[]>();
        var work = new LinkedBlockingQueue<Integer>();
        var sums = new LinkedBlockingQueue<Long>();
        var worker = new Thread(() -> {
            try {
                for (long sum = 0;;) { sum += work.take(); sums.put(sum); }
            } catch (InterruptedException e) { }
        });
        worker.setDaemon(true);
        worker.start();
        Executors.newScheduledThreadPool(2).scheduleAtFixedRate(() -> {
            byte[] garbage = new byte[1 << 16];
            Arrays.fill(garbage, (byte) 7);
            live.put((int) (System.nanoTime() % 7), garbage);
        }, 0, 5, TimeUnit.MILLISECONDS);
        var server = new ServerSocket(0, 1, InetAddress.getLoopbackAddress());
        var client = new Socket(server.getInetAddress(), server.getLocalPort());
        var echo = server.accept();
        try (var ask = new RandomAccessFile("/ask", "rw"); var answer = new RandomAccessFile("/answer", "rw"); var log = new RandomAccessFile("/log", "rw")) {
            System.out.println("ready");
            for (int n = random.nextInt(1000); ask.readLine() != null; n++) {
                work.put(n);
                client.getOutputStream().write(n % 100);
                int echoed = echo.getInputStream().read();
                for (byte[] b : live.values()) if (b[b.length - 1] != 7) throw new Error("the heap is damaged");
                log.writeBytes(n + " ");
                answer.writeBytes(n + " " + random.nextDouble() + " " + sums.take() + " " + echoed + " " + Files.readString(Path.of("/log")) + "\n");
            }
        }
    }
}
`

// nodeState is javaState for Node.js, with a worker thread, a timer, a child at a
// pipe and JavaScript that was compiled.
const nodeState = `
const fs = require("fs"), net = require("net"), { Worker } = require("worker_threads"), { spawn } = require("child_process");
const worker = new Worker('const { parentPort } = require("worker_threads"); let sum = 0; parentPort.on("message", n => { sum += n; parentPort.postMessage(sum); });', { eval: true });
const child = spawn("sh", ["-c", "n=0; while read line; do n=$((n+line)); echo $n; done"], { stdio: ["pipe", "pipe", "inherit"] });
const next = (emitter, event) => new Promise(resolve => emitter.once(event, resolve));
const collatz = n => { let steps = 0; while (n != 1) { n = n % 2 ? 3 * n + 1 : n / 2; steps++; } return steps; };
let live = new Map();
setInterval(() => live.set(Date.now() % 7, Buffer.alloc(1 << 16, 7)), 5);
const server = net.createServer(c => c.pipe(c)).listen(0, "127.0.0.1", async () => {
	const client = net.connect(server.address().port, "127.0.0.1");
	await next(client, "connect");
	const log = fs.openSync("/log", "w+"), answer = fs.openSync("/answer", "r+");
	const ask = fs.createReadStream(null, { fd: fs.openSync("/ask", "r+") });
	let n = Math.floor(Math.random() * 1000);
	console.log("ready");
	for await (const line of ask) {
		n++;
		const sum = next(worker, "message"), echoed = next(client, "data"), total = next(child.stdout, "data");
		worker.postMessage(n); client.write(String(n)); child.stdin.write(n + "\n");
		let steps = 0;
		for (let i = 1; i < 20000; i++) steps += collatz(i);
		for (const b of live.values()) if (b[b.length - 1] != 7) throw new Error("the heap is damaged");
		fs.writeSync(log, n + " ");
		fs.writeSync(answer, [n, Math.random(), steps, await sum, String(await echoed), String(await total).trim(), fs.readFileSync("/log")].join(" ") + "\n");
	}
});
`

// TestWorkloadRuntimes checkpoints a JVM and Node.js at work. The original and what
// is restored of it go on alike.
func TestWorkloadRuntimes(t *testing.T) {
	t.Parallel()
	prepare := []string{"sh", "-c", `mkfifo /ask /answer; printf %s "$1" >"$2"; shift 2; exec "$@"`, "sh"}
	for name, opts := range runtimes {
		t.Run(name, func(t *testing.T) {
			s := stack.Start(t, opts)
			ctx := s.Ctx()
			for _, w := range []struct {
				name, image string
				args        []string
			}{
				// Heaps that do not depend on how much memory the machine has.
				{"java", stack.Java, []string{javaState, "/State.java", "java", "-Xmx128m", "/State.java"}},
				{"node", stack.Node, []string{nodeState, "/state.js", "node", "/state.js"}},
			} {
				t.Run(w.name, func(t *testing.T) {
					c := s.NewContainer(ctx, w.name, w.image, stack.Args(append(prepare, w.args...)...))
					c.Start(ctx)
					c.Stdout.WaitFor(ctx, "ready")
					for range 3 {
						question(ctx, c)
					}
					ref := "stasis.test/" + w.name + "-cp:1"
					s.Stasis("checkpoint", w.name, ref, "--tcp-established")
					s.Stasis("restore", ref, w.name+"2")
					d := load(t, s, w.name+"2")
					for range 3 {
						if original, restored := question(ctx, c), question(ctx, d); original != restored || original == "" {
							t.Errorf("the original says %q, the restored %q", original, restored)
						}
					}
					for _, c := range []*stack.Container{c, d} {
						c.Kill(ctx, syscall.SIGKILL)
						c.Delete(ctx)
					}
				})
			}
		})
	}
}
