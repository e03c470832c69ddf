package node

import "testing"

func TestJudgements(t *testing.T) {
	for _, tc := range []struct {
		name string
		got  Finding
		want string
	}{
		{"criu", judgeCRIU("Version: 4.2.1\n", "6.18.0"), "ok"},
		{"criu of Debian 13 on its own kernel", judgeCRIU("Version: 4.1.1\n", "6.12.43-amd64"), "ok"},
		{"criu too old for the kernel", judgeCRIU("Version: 4.1.1\n", "6.16.1"), "missing"},
		{"criu too old for a kernel to come", judgeCRIU("Version: 4.1.1\n", "7.0"), "missing"},
		{"criu of Debian 12", judgeCRIU("Version: 3.17.1\n", "6.1.0"), "missing"},
		{"criu later", judgeCRIU("Version: 5.0\n", "6.18"), "ok"},
		{"no criu", judgeCRIU("Segmentation fault", "6.18"), "missing"},
		{"runc", judgeRunc(`{"annotations":{"org.opencontainers.runc.checkpoint.enabled": "true","org.opencontainers.runc.version": "1.3.2"}}`), "ok"},
		{"runc without criu", judgeRunc(`{"annotations":{"org.opencontainers.runc.checkpoint.enabled": "false"}}`), "warn"},
		{"crun", judgeCrun("crun version 1.21\n+SYSTEMD +SELINUX +CRIU +YAJL\n"), "ok"},
		{"crun without criu", judgeCrun("crun version 1.8.1\n+SYSTEMD +SELINUX +YAJL\n"), "warn"},
		{"containerd", judgeContainerd("v2.4.2"), "ok"},
		{"containerd of Debian 13", judgeContainerd("1.7.24~ds1"), "ok"},
		{"containerd of Debian 12", judgeContainerd("1.6.20~ds1"), "missing"},
	} {
		if tc.got.State != tc.want || tc.got.Detail == "" || tc.want == "missing" && tc.got.Fix == "" {
			t.Errorf("%s: %+v, want %s", tc.name, tc.got, tc.want)
		}
	}
}
