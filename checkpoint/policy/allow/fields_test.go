package allow

import (
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// What becomes of a field.
const (
	taken = "taken over"
	asks  = "needs a flag"
	never = "refused"
	left  = "left out"
	ours  = "replaced"
)

// fields are the fields of the runtime specification: what becomes of one that has
// a value (as JSON; "" for any) in an otherwise ordinary spec.
var fields = map[string]struct{ value, becomes string }{
	"ociVersion":                                              {"", ours},
	"process.terminal":                                        {"", taken},
	"process.consoleSize.height":                              {"", taken},
	"process.consoleSize.width":                               {"", taken},
	"process.user.uid":                                        {"", taken},
	"process.user.gid":                                        {"", taken},
	"process.user.umask":                                      {"", taken},
	"process.user.additionalGids":                             {"", taken},
	"process.user.username":                                   {"", never},
	"process.args":                                            {"", taken},
	"process.commandLine":                                     {"", never},
	"process.env":                                             {"", taken},
	"process.cwd":                                             {"", taken},
	"process.capabilities.bounding":                           {`["CAP_SYS_ADMIN"]`, asks},
	"process.capabilities.effective":                          {`["CAP_SYS_PTRACE"]`, asks},
	"process.capabilities.inheritable":                        {`["CAP_BPF"]`, asks},
	"process.capabilities.permitted":                          {`["CAP_NET_ADMIN"]`, asks},
	"process.capabilities.ambient":                            {`["CAP_SYS_MODULE"]`, asks},
	"process.rlimits[].type":                                  {`"RLIMIT_MAGIC"`, never},
	"process.rlimits[].hard":                                  {`100000`, asks},
	"process.rlimits[].soft":                                  {`100000`, asks},
	"process.noNewPrivileges":                                 {`false`, asks},
	"process.apparmorProfile":                                 {"", asks},
	"process.oomScoreAdj":                                     {`-1`, asks},
	"process.scheduler.policy":                                {`"SCHED_FIFO"`, asks},
	"process.scheduler.nice":                                  {`-1`, asks},
	"process.scheduler.priority":                              {"", asks},
	"process.scheduler.flags":                                 {"", asks},
	"process.scheduler.runtime":                               {"", asks},
	"process.scheduler.deadline":                              {"", asks},
	"process.scheduler.period":                                {"", asks},
	"process.selinuxLabel":                                    {`"system_u:system_r:spc_t:s0"`, asks},
	"process.ioPriority.class":                                {`"IOPRIO_CLASS_RT"`, asks},
	"process.ioPriority.priority":                             {"", taken},
	"process.execCPUAffinity.initial":                         {`"0-3"`, taken},
	"process.execCPUAffinity.final":                           {`"evil"`, never},
	"root.path":                                               {"", ours},
	"root.readonly":                                           {"", taken},
	"hostname":                                                {"", taken},
	"domainname":                                              {"", taken},
	"mounts[].destination":                                    {`"relative"`, never},
	"mounts[].type":                                           {`"bind"`, never}, // of no source
	"mounts[].source":                                         {"", taken},
	"mounts[].options":                                        {`["shared"]`, never},
	"mounts[].uidMappings[].containerID":                      {"", never},
	"mounts[].uidMappings[].hostID":                           {"", never},
	"mounts[].uidMappings[].size":                             {"", never},
	"mounts[].gidMappings[].containerID":                      {"", never},
	"mounts[].gidMappings[].hostID":                           {"", never},
	"mounts[].gidMappings[].size":                             {"", never},
	"annotations":                                             {"", left},
	"linux.uidMappings[].containerID":                         {"", taken},
	"linux.uidMappings[].hostID":                              {"", taken},
	"linux.uidMappings[].size":                                {"", taken},
	"linux.gidMappings[].containerID":                         {"", taken},
	"linux.gidMappings[].hostID":                              {"", taken},
	"linux.gidMappings[].size":                                {"", taken},
	"linux.sysctl":                                            {`{"kernel.core_pattern":"x"}`, asks},
	"linux.resources.devices[].allow":                         {`false`, taken},
	"linux.resources.devices[].type":                          {`"x"`, never},
	"linux.resources.devices[].major":                         {"", asks},
	"linux.resources.devices[].minor":                         {"", asks},
	"linux.resources.devices[].access":                        {`"x"`, never},
	"linux.resources.memory.limit":                            {"", taken},
	"linux.resources.memory.reservation":                      {"", taken},
	"linux.resources.memory.swap":                             {"", taken},
	"linux.resources.memory.kernel":                           {"", taken},
	"linux.resources.memory.kernelTCP":                        {"", taken},
	"linux.resources.memory.swappiness":                       {"", taken},
	"linux.resources.memory.disableOOMKiller":                 {"", asks},
	"linux.resources.memory.useHierarchy":                     {"", taken},
	"linux.resources.memory.checkBeforeUpdate":                {"", taken},
	"linux.resources.cpu.shares":                              {"", taken},
	"linux.resources.cpu.quota":                               {"", taken},
	"linux.resources.cpu.burst":                               {"", taken},
	"linux.resources.cpu.period":                              {"", taken},
	"linux.resources.cpu.realtimeRuntime":                     {"", asks},
	"linux.resources.cpu.realtimePeriod":                      {"", asks},
	"linux.resources.cpu.cpus":                                {`"0-3"`, taken},
	"linux.resources.cpu.mems":                                {`"/../x"`, never},
	"linux.resources.cpu.idle":                                {"", taken},
	"linux.resources.pids.limit":                              {"", taken},
	"linux.resources.blockIO.weight":                          {"", taken},
	"linux.resources.blockIO.leafWeight":                      {"", taken},
	"linux.resources.blockIO.weightDevice[].major":            {"", taken},
	"linux.resources.blockIO.weightDevice[].minor":            {"", taken},
	"linux.resources.blockIO.weightDevice[].weight":           {"", taken},
	"linux.resources.blockIO.weightDevice[].leafWeight":       {"", taken},
	"linux.resources.blockIO.throttleReadBpsDevice[].major":   {"", taken},
	"linux.resources.blockIO.throttleReadBpsDevice[].minor":   {"", taken},
	"linux.resources.blockIO.throttleReadBpsDevice[].rate":    {"", taken},
	"linux.resources.blockIO.throttleWriteBpsDevice[].major":  {"", taken},
	"linux.resources.blockIO.throttleWriteBpsDevice[].minor":  {"", taken},
	"linux.resources.blockIO.throttleWriteBpsDevice[].rate":   {"", taken},
	"linux.resources.blockIO.throttleReadIOPSDevice[].major":  {"", taken},
	"linux.resources.blockIO.throttleReadIOPSDevice[].minor":  {"", taken},
	"linux.resources.blockIO.throttleReadIOPSDevice[].rate":   {"", taken},
	"linux.resources.blockIO.throttleWriteIOPSDevice[].major": {"", taken},
	"linux.resources.blockIO.throttleWriteIOPSDevice[].minor": {"", taken},
	"linux.resources.blockIO.throttleWriteIOPSDevice[].rate":  {"", taken},
	"linux.resources.hugepageLimits[].pageSize":               {`"../x"`, never},
	"linux.resources.hugepageLimits[].limit":                  {"", taken},
	"linux.resources.network.classID":                         {"", asks},
	"linux.resources.network.priorities[].name":               {"", asks},
	"linux.resources.network.priorities[].priority":           {"", asks},
	"linux.resources.rdma{}.hcaHandles":                       {"", taken},
	"linux.resources.rdma{}.hcaObjects":                       {"", taken},
	"linux.resources.unified":                                 {`{"devices.allow":"a"}`, never},
	"linux.cgroupsPath":                                       {`"/a/b/c"`, asks},
	"linux.namespaces[].type":                                 {`"magic"`, never},
	"linux.namespaces[].path":                                 {`"/run/netns/x"`, asks},
	"linux.devices[].path":                                    {`"/dev/x"`, asks},
	"linux.devices[].type":                                    {`"b"`, asks},
	"linux.devices[].major":                                   {"", asks},
	"linux.devices[].minor":                                   {"", asks},
	"linux.devices[].fileMode":                                {"", taken},
	"linux.devices[].uid":                                     {"", taken},
	"linux.devices[].gid":                                     {"", taken},
	"linux.netDevices{}.name":                                 {"", left},
	"linux.seccomp.defaultAction":                             {`"SCMP_ACT_ALLOW"`, asks},
	"linux.seccomp.defaultErrnoRet":                           {"", taken},
	"linux.seccomp.architectures":                             {"", asks},
	"linux.seccomp.flags":                                     {"", asks},
	"linux.seccomp.listenerPath":                              {"", never},
	"linux.seccomp.listenerMetadata":                          {"", never},
	"linux.seccomp.syscalls[].names":                          {`["bpf"]`, taken}, // which fails
	"linux.seccomp.syscalls[].action":                         {`"SCMP_ACT_ALLOW"`, asks},
	"linux.seccomp.syscalls[].errnoRet":                       {"", taken},
	"linux.seccomp.syscalls[].args[].index":                   {"", taken},
	"linux.seccomp.syscalls[].args[].value":                   {"", taken},
	"linux.seccomp.syscalls[].args[].valueTwo":                {"", taken},
	"linux.seccomp.syscalls[].args[].op":                      {"", taken},
	"linux.rootfsPropagation":                                 {`"rshared"`, never},
	"linux.maskedPaths":                                       {`[]`, asks},
	"linux.readonlyPaths":                                     {`[]`, asks},
	"linux.mountLabel":                                        {`"evil"`, never},
	"linux.intelRdt.closID":                                   {"", left},
	"linux.intelRdt.schemata":                                 {"", left},
	"linux.intelRdt.l3CacheSchema":                            {"", left},
	"linux.intelRdt.memBwSchema":                              {"", left},
	"linux.intelRdt.enableMonitoring":                         {"", left},
	"linux.memoryPolicy.mode":                                 {"", asks},
	"linux.memoryPolicy.nodes":                                {"", asks},
	"linux.memoryPolicy.flags":                                {"", asks},
	"linux.personality.domain":                                {`"LINUX32"`, taken},
	"linux.personality.flags":                                 {"", never},
	"linux.timeOffsets{}.secs":                                {"", taken},
	"linux.timeOffsets{}.nanosecs":                            {"", taken},
}

// refusedWhole are sections of which no field is looked at.
var refusedWhole = []string{"solaris", "windows", "vm", "zos", "freebsd"}

// leaf is a field of the specification that has no fields of its own.
type leaf struct {
	path string
	// set makes the value in a spec.
	set func(spec *specs.Spec, value string) error
}

// leaves lists them. get returns where the field is, making what it is in.
func leaves(path string, t reflect.Type, get func(*specs.Spec) reflect.Value) (list []leaf) {
	switch {
	case t.Kind() == reflect.Pointer:
		return leaves(path, t.Elem(), func(s *specs.Spec) reflect.Value {
			v := get(s)
			if v.IsNil() {
				v.Set(reflect.New(t.Elem()))
			}
			return v.Elem()
		})
	case t.Kind() == reflect.Slice && t.Elem().Kind() == reflect.Struct:
		return leaves(path+"[]", t.Elem(), func(s *specs.Spec) reflect.Value {
			v := get(s)
			if v.Len() == 0 {
				v.Set(reflect.Append(v, reflect.Zero(t.Elem())))
			}
			return v.Index(v.Len() - 1)
		})
	case t.Kind() == reflect.Map && t.Elem().Kind() == reflect.Struct:
		for _, l := range leaves(path+"{}", t.Elem(), nil) {
			name := l.path[strings.LastIndex(l.path, ".")+1:]
			list = append(list, leaf{l.path, func(s *specs.Spec, value string) error {
				m, e := reflect.MakeMap(t), reflect.New(t.Elem())
				err := json.Unmarshal([]byte(`{"`+name+`":`+value+`}`), e.Interface())
				m.SetMapIndex(reflect.ValueOf("key").Convert(t.Key()), e.Elem())
				get(s).Set(m)
				return err
			}})
		}
		return list
	case t.Kind() == reflect.Struct:
		for _, f := range reflect.VisibleFields(t) {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if f.Anonymous || name == "" {
				continue
			}
			list = append(list, leaves(strings.TrimPrefix(path+"."+name, "."), f.Type, func(s *specs.Spec) reflect.Value { return get(s).FieldByIndex(f.Index) })...)
		}
		return list
	}
	return []leaf{{path, func(s *specs.Spec, value string) error {
		if value == "" {
			value = anyValue(t)
		}
		v := reflect.New(t)
		err := json.Unmarshal([]byte(value), v.Interface())
		get(s).Set(v.Elem())
		return err
	}}}
}

// anyValue is one that is not the zero value.
func anyValue(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return `"x"`
	case reflect.Bool:
		return "true"
	case reflect.Slice:
		return "[" + anyValue(t.Elem()) + "]"
	case reflect.Map:
		return `{"x":"y"}`
	}
	return "7"
}

// TestFields fails for a field of the runtime specification that has no rule, and
// looks that each has the rule it should.
func TestFields(t *testing.T) {
	got := map[string]bool{}
	spec := func(s *specs.Spec) reflect.Value { return reflect.ValueOf(s).Elem() }
	for _, l := range leaves("", reflect.TypeFor[specs.Spec](), spec) {
		got[l.path] = true
		section, _, _ := strings.Cut(l.path, ".")
		want, known := fields[l.path]
		switch {
		case strings.HasPrefix(l.path, "hooks."):
			want.becomes = left
		case slices.Contains(refusedWhole, section):
			want.becomes = never
		case !known:
			t.Errorf("%s has no rule", l.path)
			continue
		}
		asked := ordinary(t)
		asked.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/null", Type: "c", Major: 1, Minor: 3}}
		asked.Linux.Resources.HugepageLimits = []specs.LinuxHugepageLimit{{Pagesize: "2MB"}}
		asked.Process.IOPriority = &specs.LinuxIOPriority{Class: specs.IOPRIO_CLASS_BE}
		before := dump(asked)
		if want.value == "" && strings.Contains(l.path, "{}") {
			want.value = "7"
			if strings.HasSuffix(l.path, ".name") {
				want.value = `"x"`
			}
		}
		if err := l.set(asked, want.value); err != nil {
			t.Errorf("%s: %v", l.path, err)
			continue
		}
		if dump(asked) == before {
			t.Errorf("%s: the value is the same as before", l.path)
		}
		if got := outcome(t, asked); got != want.becomes {
			t.Errorf("%s: %s, want %s", l.path, got, want.becomes)
		}
	}
	for path := range fields {
		if !got[path] {
			t.Errorf("the specification has no %s any more", path)
		}
	}
}

// outcome is what becomes of a spec of which one field is not ordinary.
func outcome(t *testing.T, asked *specs.Spec) string {
	spec, list, err := New(asked, nil, options(Grants{}))
	verdicts := map[Verdict]bool{}
	for _, a := range list {
		verdicts[a.Verdict] = true
	}
	want := clone(asked)
	want.Linux.CgroupsPath = spec.Linux.CgroupsPath
	switch {
	case verdicts[Never] && err != nil:
		return never
	case verdicts[NeedsFlag] && err != nil:
		return asks
	case verdicts[LeftOut] && err == nil:
		return left
	case reflect.DeepEqual(clone(spec), want):
		return taken
	}
	want.Version, want.Root.Path = spec.Version, spec.Root.Path
	if reflect.DeepEqual(clone(spec), want) {
		return ours
	}
	return dump(list)
}
