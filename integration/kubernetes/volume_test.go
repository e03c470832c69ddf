package kubernetes

import (
	"encoding/base64"
	"encoding/json"
	"strings"
	"testing"
)

const volumePod = `apiVersion: v1
kind: ConfigMap
metadata: {name: NAME}
data: {value: config of NAME}
---
apiVersion: v1
kind: Secret
metadata: {name: NAME}
stringData: {value: secret of NAME}
---
apiVersion: v1
kind: PersistentVolume
metadata: {name: NAME}
spec:
  capacity: {storage: 1Mi}
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  claimRef: {namespace: default, name: NAME}
  hostPath: {path: /var/lib/volume-NAME, type: DirectoryOrCreate}
---
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: NAME}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: ""
  volumeName: NAME
  resources: {requests: {storage: 1Mi}}
---
apiVersion: v1
kind: Pod
metadata: {name: NAME, labels: {is: NAME}}
spec:
  runtimeClassName: stasis
  nodeSelector: {kubernetes.io/hostname: NODE}
  terminationGracePeriodSeconds: 1
  containers:
  - name: app
    image: IMAGE
    imagePullPolicy: IfNotPresent
    command: [python3, /app.py]
    env: [{name: NAME, value: NAME}]
    resources: {limits: {memory: MEMORY, cpu: "1"}, requests: {memory: 16Mi, cpu: 10m}}
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    volumeMounts:
    - {name: config, mountPath: /config}
    - {name: config, mountPath: /one/file, subPath: value}
    - {name: secret, mountPath: /secret, readOnly: true}
    - {name: scratch, mountPath: /scratch}
    - {name: memory, mountPath: /memory}
    - {name: host, mountPath: /host}
    - {name: claim, mountPath: /claim}
    - {name: info, mountPath: /info}
  volumes:
  - {name: config, configMap: {name: NAME}}
  - {name: secret, secret: {secretName: NAME}}
  - {name: scratch, emptyDir: {}}
  - {name: memory, emptyDir: {medium: Memory}}
  - {name: host, hostPath: {path: /var/lib/host-NAME, type: DirectoryOrCreate}}
  - {name: claim, persistentVolumeClaim: {claimName: NAME}}
  - {name: info, downwardAPI: {items: [{path: is, fieldRef: {fieldPath: "metadata.labels['is']"}}]}}
`

// testVolumes restores a pod with volumes of all kinds, each of which is the new
// pod's.
func (e *env) testVolumes(t *testing.T) {
	e.Apply(t, render(volumePod, "NAME", "volume-a", "NODE", e.here.Name, "IMAGE", App, "MEMORY", "256Mi"))
	e.WaitReady(t, "volume-a")
	e.Kubectl(t, "exec", "volume-a", "--", "sh", "-c", "echo here >/scratch/file; echo here >/memory/file; echo here >/host/file")
	ref := e.checkpoint(t, e.here, "volume-a", "app")[0]
	e.there.WriteFile(t, "/var/lib/host-volume-b/file", "there\n")
	e.there.WriteFile(t, "/var/lib/volume-volume-b/file", "claimed there\n")
	e.Apply(t, render(volumePod, "NAME", "volume-b", "NODE", e.there.Name, "IMAGE", ref, "MEMORY", "128Mi"))
	p := e.WaitReady(t, "volume-b")
	get := e.forward(t, "volume-b", 8080)
	// The process that was restored reads them, not one that kubectl starts.
	read := func(path string) string { return get("/read" + path) }
	for path, want := range map[string]string{
		"/config/value":             "config of volume-b",
		"/one/file":                 "config of volume-b",
		"/secret/value":             "secret of volume-b",
		"/claim/file":               "claimed there\n",
		"/host/file":                "there\n",
		"/info/is":                  "volume-b",
		"/etc/hostname":             "volume-b\n",
		"/proc/sys/kernel/hostname": "volume-b\n",
	} {
		if got := read(path); got != want {
			t.Errorf("%s is %q, want %q", path, got, want)
		}
	}
	for _, path := range []string{"/scratch", "/memory"} {
		if out := e.Kubectl(t, "exec", "volume-b", "--", "ls", path); out != "" {
			t.Errorf("%s, which begins empty in each pod, has %q", path, out)
		}
		e.Kubectl(t, "exec", "volume-b", "--", "touch", path+"/new")
	}
	if hosts := read("/etc/hosts"); !strings.Contains(hosts, p.Status.PodIP) {
		t.Errorf("/etc/hosts has not %s: %q", p.Status.PodIP, hosts)
	}
	if resolv := read("/etc/resolv.conf"); !strings.Contains(resolv, "nameserver ") {
		t.Errorf("/etc/resolv.conf is %q", resolv)
	}
	// The token is of this very pod.
	parts := strings.Split(read("/var/run/secrets/kubernetes.io/serviceaccount/token"), ".")
	var claims struct {
		Kubernetes struct {
			Pod struct{ Name, UID string }
		} `json:"kubernetes.io"`
	}
	if len(parts) != 3 {
		t.Fatalf("the token has %d parts", len(parts))
	}
	payload, err := base64.RawURLEncoding.DecodeString(parts[1])
	if err == nil {
		err = json.Unmarshal(payload, &claims)
	}
	if err != nil || claims.Kubernetes.Pod.Name != "volume-b" || claims.Kubernetes.Pod.UID != p.Metadata.UID {
		t.Errorf("the token is of pod %+v, %v; want volume-b, %s", claims.Kubernetes.Pod, err, p.Metadata.UID)
	}
	// So are limits, as the node sees them.
	_, id, _ := strings.Cut(p.Container("app").ContainerID, "://")
	limit, err := e.there.Run(t.Context(), "find", "/sys/fs/cgroup", "-path", "*"+id+"/memory.limit_in_bytes", "-exec", "cat", "{}", ";",
		"-o", "-path", "*"+id+"/memory.max", "-exec", "cat", "{}", ";")
	if want := 128 << 20; err != nil || number(t, limit) != want {
		t.Errorf("the memory limit is %q, %v, want %d", limit, err, want)
	}
}
