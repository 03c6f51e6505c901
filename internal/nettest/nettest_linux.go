package nettest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const envInside = "DOPPEL_TEST_NETNS"

// Inside reports whether the calling test or benchmark runs in a network and mount namespace of its own. When it does not, it runs
// the test again in such a process, reports that process's result as t's, and returns false: the caller then returns. Inside, lo is
// up and mounts are private. Without root the test is skipped.
func Inside(t testing.TB) bool {
	t.Helper()
	if os.Getenv(envInside) == t.Name() {
		setUp(t)
		return true
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root: network namespaces, TUN devices and nftables")
	}
	pattern := "^" + strings.ReplaceAll(t.Name(), "/", "$/^") + "$" // a subtest and none whose name has its name in it
	run := "-test.run=" + pattern
	args := []string{run, "-test.v=" + fmt.Sprint(testing.Verbose()), "-test.count=1"}
	if _, ok := t.(*testing.B); ok {
		args = []string{"-test.run=^$", "-test.bench=" + pattern, "-test.benchtime=1x"}
	}
	if tt, ok := t.(*testing.T); ok {
		if dl, has := tt.Deadline(); has {
			args = append(args, "-test.timeout="+(time.Until(dl)-time.Second).String())
		}
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), envInside+"="+t.Name())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("in its own namespaces: %v\n%s", err, out)
	}
	if strings.Contains(string(out), "--- SKIP") {
		t.Skipf("%s", out)
	}
	t.Logf("%s", out)
	return false
}

func setUp(t testing.TB) {
	t.Helper()
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		t.Fatalf("make mounts private: %v", err)
	}
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatalf("find lo: %v", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		t.Fatalf("set lo up: %v", err)
	}
}

// Cover mounts an empty directory over dir, in the test's own mount namespace.
func Cover(t testing.TB, dir string) {
	t.Helper()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatalf("mount over %s: %v", dir, err)
	}
}

// AddAddr gives lo an address.
func AddAddr(t testing.TB, cidr string) {
	t.Helper()
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		t.Fatalf("find lo: %v", err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		t.Fatalf("address %s: %v", cidr, err)
	}
	a.Flags = unix.IFA_F_NODAD
	if err := netlink.AddrAdd(lo, a); err != nil {
		t.Fatalf("add %s to lo: %v", cidr, err)
	}
}
