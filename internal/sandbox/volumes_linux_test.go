package sandbox

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var garbage atomic.Pointer[[]byte]

// asNobody has a command of WithVolumes run as it is by a user without rights.
func asNobody(cmd *exec.Cmd) {
	cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
	cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 65534, Size: 1}}
	cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 65534, HostID: 65534, Size: 1}}
	cmd.SysProcAttr.AmbientCaps = []uintptr{unix.CAP_SYS_ADMIN}
	cmd.SysProcAttr.Credential = &syscall.Credential{Uid: 65534, Gid: 65534, NoSetGroups: true}
}

// A command sees the app's volumes at their own paths where the machine has nothing, and the machine as it is everywhere else.
func TestWithVolumes(t *testing.T) {
	if os.Getenv("DOPPEL_TEST_VOLUMES") != "" {
		args := os.Args[len(os.Args)-int(os.Getenv("DOPPEL_TEST_VOLUMES")[0]-'0'):]
		if os.Getenv("DOPPEL_TEST_BUSY") != "" { // what is collected has goroutines change their threads
			for range 8 {
				go func() {
					for {
						b := make([]byte, 1<<16)
						garbage.Store(&b)
					}
				}()
			}
		}
		t.Fatal(BecomeWithVolumes(args, func(err error) { fmt.Fprintln(os.Stderr, "told:", err) }))
	}
	for _, as := range []string{"root", "nobody"} {
		t.Run(as, func(t *testing.T) {
			if os.Getuid() != 0 {
				t.Skip("needs root to be root and nobody")
			}
			root, err := os.MkdirTemp("", "volumes")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(root) })
			for name, text := range map[string]string{
				"/doppel-none/data/f": "in data", "/etc/doppel-none.conf": "one file", "/var/run/secrets/doppel-none/token": "token", "/etc/passwd": "not this one",
				"/tmp/doppel-none/f": "not there: files of the command's own stay in /tmp",
			} {
				file := filepath.Join(root, name)
				if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			for d := root; ; d = filepath.Dir(d) {
				if d == os.TempDir() {
					break
				}
				if err := os.Chmod(d, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			cmd := exec.Command("sh", "-c", `cat /doppel-none/data/f /etc/doppel-none.conf /run/secrets/doppel-none/token; head -c 5 /etc/passwd; ls -d /tmp/doppel-none; pwd; echo made > /tmp/doppel-made; ls /proc/self/fd | wc -l; grep CapEff /proc/self/status`)
			cmd.Dir = "/usr/share"
			paths := []string{"/doppel-none/data", "/etc/doppel-none.conf", "/var/run/secrets/doppel-none", "/etc/passwd", "/tmp/doppel-none"}
			plain := cmd.Args
			WithVolumes(cmd, []string{"-test.run", "^TestWithVolumes$"}, root, paths)
			if as == "nobody" {
				asNobody(cmd)
			}
			cmd.Env = append(os.Environ(), "DOPPEL_TEST_VOLUMES="+string(rune('0'+2+len(plain))))
			out, err := cmd.CombinedOutput()
			want := "in dataone filetokenroot:"
			if !strings.HasPrefix(string(out), want) || !strings.Contains(string(out), "'/tmp/doppel-none': No such file") || !strings.Contains(string(out), "\n/usr/share\n") {
				t.Errorf("%v\n%s", err, out)
			}
			if as == "nobody" && !strings.Contains(string(out), "CapEff:\t0000000000000000") {
				t.Errorf("capabilities are left: %s", out)
			}
			if _, err := os.Stat("/tmp/doppel-made"); err != nil {
				t.Error("a file that the command made in /tmp is gone: ", err)
			}
			_ = os.Remove("/tmp/doppel-made")
			for _, p := range paths {
				if _, err := os.Lstat(p); err == nil && p != "/etc/passwd" {
					t.Errorf("%s is on the machine", p)
				}
			}
		})
	}
}

// The helper's rights are not the command's, whichever thread each of its steps is on.
func TestNoRightsLeft(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root to be nobody")
	}
	for range 50 {
		cmd := exec.Command("grep", "CapEff", "/proc/self/status")
		WithVolumes(cmd, []string{"-test.run", "^TestWithVolumes$"}, "/", []string{"/etc"})
		asNobody(cmd)
		cmd.Env = append(os.Environ(), "DOPPEL_TEST_VOLUMES=5", "DOPPEL_TEST_BUSY=1")
		if out, err := cmd.CombinedOutput(); err != nil || string(out) != "CapEff:\t0000000000000000\n" {
			t.Fatalf("%v\n%s", err, out)
		}
	}
}
