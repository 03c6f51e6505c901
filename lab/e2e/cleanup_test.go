package e2e

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/doppel-dev/doppel/lab/internal/ns"
	"github.com/doppel-dev/doppel/lab/internal/state"
)

// machine is what of this machine a lab must leave as it was, but for other labs.
func machine(t *testing.T) map[string]string {
	t.Helper()
	m := map[string]string{}
	for _, f := range []string{
		"/etc/resolv.conf", "/proc/sys/vm/overcommit_memory", "/proc/sys/kernel/panic", "/proc/sys/kernel/panic_on_oops",
		"/proc/sys/kernel/keys/root_maxkeys", "/proc/sys/net/ipv4/ip_forward",
	} {
		b, err := os.ReadFile(f)
		m[f] = fmt.Sprint(string(b), err)
	}
	for _, d := range []string{"/var/lib/kubelet", "/var/lib/cni", "/var/lib/containerd", "/var/log/pods", "/var/log/containers", "/run/containerd", "/run/netns", "/opt/containerd", "/opt/cni"} {
		m[d] = strings.Join(below(d), "\n")
	}
	return m
}

func below(dir string) []string {
	var all []string
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil {
			all = append(all, path)
		}
		return nil // a directory that is not there has nothing below it
	})
	return all
}

// processes lists the lab's holders and all their descendants, by what identifies a process.
func processes(t *testing.T, lab *state.Lab) []state.Process {
	t.Helper()
	all := []state.Process{lab.Wan}
	for _, n := range lab.Nodes {
		all = append(all, n)
	}
	for _, l := range lab.Laptops {
		all = append(all, l.Holder)
	}
	children := map[int][]int{}
	dirs, err := filepath.Glob("/proc/[0-9]*/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range dirs {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(file)))
		if err != nil {
			t.Fatal(err)
		}
		if parent, err := strconv.Atoi(statusField(pid, "PPid")); err == nil {
			children[parent] = append(children[parent], pid)
		}
	}
	for i := 0; i < len(all); i++ {
		for _, pid := range children[all[i].PID] {
			if p, err := ns.Identify(pid); err == nil {
				all = append(all, p)
			}
		}
	}
	return all
}

// statusField is a field of /proc/PID/status, empty if the process is gone.
func statusField(pid int, name string) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(b), "\n"+name+":")
	line, _, _ := strings.Cut(rest, "\n")
	return strings.TrimSpace(line)
}

func checkDead(t *testing.T, all []state.Process) {
	t.Helper()
	for _, p := range all {
		if ns.Alive(p) {
			t.Errorf("process %d is left: %s", p.PID, statusField(p.PID, "Name"))
		}
	}
}

// checkGone checks that nothing of the lab is left.
func checkGone(t *testing.T, lab *state.Lab, all []state.Process, before map[string]string) {
	t.Helper()
	checkDead(t, all)
	if _, err := os.Stat(lab.Path()); err == nil {
		t.Errorf("%s is left", lab.Path())
	}
	if _, err := os.Stat(filepath.Join(state.Root, "."+lab.Plan.Name+".lock")); err == nil {
		t.Error("the lock is left")
	}
	if _, err := os.Stat("/sys/class/net/" + lab.Plan.HostLink()); err == nil {
		t.Errorf("the link %s is left", lab.Plan.HostLink())
	}
	groups, _ := filepath.Glob("/sys/fs/cgroup/*/" + lab.Plan.Cgroup())
	more, _ := filepath.Glob("/sys/fs/cgroup/" + lab.Plan.Cgroup())
	if groups = append(groups, more...); len(groups) > 0 {
		t.Errorf("control groups are left: %v", groups)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(mounts), lab.Path()) {
		t.Error("mounts are left")
	}
	for what, was := range before {
		if now := machine(t)[what]; now != was {
			t.Errorf("%s has changed from\n%s\nto\n%s", what, was, now)
		}
	}
}

func TestDownLeavesNothing(t *testing.T) {
	before := machine(t)
	p := newProgram(t, "e2e-down")
	p.must("up")
	p.must("laptop", "add", "bob")
	p.laptop("bob", "sleep 600 >/dev/null 2>&1 </dev/null & sleep 0.1")
	lab := p.record()
	all := processes(t, lab)
	if len(all) < 12 { // 3 holders, 7 servers, and at least a shim, a pause and CoreDNS
		t.Errorf("only %d processes are found inside the lab", len(all))
	}
	p.must("down")
	checkGone(t, lab, all, before)
	if got := p.state(); got != "down" {
		t.Errorf("state %s", got)
	}
	p.must("down") // again is no error
}

// TestKill ends every kind of process of a lab in turn, the rudest way.
func TestKill(t *testing.T) {
	before := machine(t)
	p := newProgram(t, "e2e-kill")
	p.must("up")
	p.must("laptop", "add", "bob")
	lab := p.record()
	all := processes(t, lab)
	kill(t, lab.Laptops["bob"].Holder.PID)
	p.must("laptop", "add", "bob") // its remains are no obstacle
	kill(t, serverPID(t, lab, "node1/kubelet"))
	eventually(t, "a killed kubelet shows", damaged(p))
	if _, out, code := p.run("up"); code != 0 || !strings.Contains(out, "node1/kubelet is gone") {
		t.Errorf("up of a damaged lab: %d %s", code, out)
	}
	checkDead(t, all)
	lab = p.record()
	all = processes(t, lab)
	kill(t, lab.Nodes["node1"].PID)
	kill(t, lab.Wan.PID)
	eventually(t, "a killed node shows", damaged(p))
	p.must("down")
	checkGone(t, lab, all, before)
}

// TestKillUp ends up itself in the middle.
func TestKillUp(t *testing.T) {
	before := machine(t)
	p := newProgram(t, "e2e-half")
	for _, step := range []string{"network:", "is ready"} {
		cmd := p.command("up")
		stderr, err := cmd.StderrPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		for lines := bufio.NewScanner(stderr); lines.Scan(); {
			if strings.Contains(lines.Text(), step) {
				kill(t, cmd.Process.Pid)
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatalf("up was not killed at %q", step)
		}
		if got := p.state(); got != "starting" {
			t.Errorf("state %s", got)
		}
		if _, out, code := p.run("laptop", "add", "x"); code == 0 || !strings.Contains(out, "not ready") {
			t.Errorf("a laptop of half a lab: %d %s", code, out)
		}
	}
	lab := p.record()
	all := processes(t, lab)
	p.must("down")
	checkGone(t, lab, all, before)
}

func TestTwoLabsSideBySide(t *testing.T) {
	a, b := newProgram(t, "e2e-a"), newProgram(t, "e2e-b")
	done := make(chan string, 2)
	for _, p := range []program{a, b} {
		go func() {
			out, err := p.command("up").CombinedOutput()
			done <- fmt.Sprint(err) + string(out)
		}()
	}
	for range 2 {
		if out := <-done; !strings.HasPrefix(out, "<nil>") {
			t.Error(out)
		}
	}
	if a.record().Plan.Index == b.record().Plan.Index {
		t.Error("both have the same subnet")
	}
	a.must("laptop", "add", "alice")
	b.must("laptop", "add", "alice")
	a.must("down")
	if got := b.state(); got != "up" {
		t.Errorf("one lab is %s after the other's down", got)
	}
	if out, code := b.laptop("alice", "curl -skf https://"+b.record().Plan.APIServer().String()+"/version"); code != 0 {
		t.Errorf("its API server: %d %s", code, out)
	}
}

func damaged(p program) func(context.Context) error {
	return func(context.Context) error {
		if got := p.state(); got != "damaged" {
			return fmt.Errorf("the lab is %s", got)
		}
		return nil
	}
}

func kill(t *testing.T, pid int) {
	t.Helper()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// serverPID finds the id that a server has on the machine.
func serverPID(t *testing.T, lab *state.Lab, name string) int {
	t.Helper()
	server := lab.Servers[name]
	for _, p := range processes(t, lab) {
		ids := strings.Fields(statusField(p.PID, "NSpid"))
		if len(ids) == 2 && ids[1] == strconv.Itoa(server.Process.PID) && p.Start == server.Process.Start {
			return p.PID
		}
	}
	t.Fatalf("%s does not run", name)
	return 0
}
