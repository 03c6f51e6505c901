package rootd

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/rootapi"
	"github.com/doppel-dev/doppel/internal/uerr"
	"github.com/doppel-dev/doppel/internal/xlog"
)

func TestConfig(t *testing.T) {
	for name, cfg := range map[string]Config{
		"relative socket": {Socket: "rootd.sock"},
		"negative uid":    {UID: -2},
		"negative ping":   {PingEvery: -1},
	} {
		if _, err := New(cfg); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestAllowed(t *testing.T) {
	for _, tc := range []struct {
		name string
		cfg  Config
		peer peer
		want bool
	}{
		{"root", Config{UID: NoUID}, peer{uid: 0}, true},
		{"the user", Config{UID: 1000}, peer{uid: 1000}, true},
		{"another", Config{UID: 1000}, peer{uid: 1001, groups: []uint32{0, 1000}}, false},
		{"nobody named", Config{UID: NoUID}, peer{uid: 1<<32 - 1}, false},
		{"service, no member", Config{UID: NoUID, Service: true}, peer{uid: 1001, groups: []uint32{1<<32 - 2}}, false},
	} {
		err := tc.cfg.allowed(tc.peer)
		if ue, ok := errors.AsType[*uerr.Error](err); (err == nil) != tc.want || err != nil && (!ok || ue.Kind != uerr.Denied || ue.Hint == "") {
			t.Errorf("%s: %v", tc.name, err)
		}
	}
}

func TestGroupMember(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	nettest.Cover(t, "/etc")
	if err := os.WriteFile("/etc/group", []byte("doppel:x:7777:\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	cfg := Config{UID: NoUID, Service: true}
	if err := cfg.allowed(peer{uid: 1001, groups: []uint32{5, 7777, 1001}}); err != nil {
		t.Error(err)
	}
	if cfg.allowed(peer{uid: 1001, groups: []uint32{5, 1001}}) == nil {
		t.Error("no member, and allowed")
	}
	if _, gid, err := socketOwner(cfg); gid != 7777 || err != nil {
		t.Errorf("group of the socket: %d, %v", gid, err)
	}
}

// A service logs as its users ask, and is ended by the system only.
func TestServiceLevel(t *testing.T) {
	s := &Server{cfg: Config{Service: true, Level: new(xlog.Level)}, log: slog.New(slog.DiscardHandler)}
	ada, bob := &session{peer: peer{uid: 1001}}, &session{peer: peer{uid: 1002}}
	if err := s.setLevel(ada, "debug", 0); err != nil {
		t.Error(err)
	}
	s.owner = ada
	if err := s.setLevel(ada, "info", 0); err != nil {
		t.Error(err)
	}
	if s.setLevel(bob, "debug", 0) == nil || s.mayQuit(ada, false) == nil {
		t.Error("allowed")
	}
}

func TestSocketDirectory(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: ownership of directories")
	}
	dir := t.TempDir()
	made, err := makeDir(filepath.Join(dir, "a", "b"))
	if err != nil || !made {
		t.Fatalf("%v, %v", made, err)
	}
	if made, err := makeDir(filepath.Join(dir, "a", "b")); err != nil || made {
		t.Errorf("again: %v, %v", made, err)
	}
	if err := os.Chmod(filepath.Join(dir, "a"), 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := makeDir(filepath.Join(dir, "a", "b")); err == nil {
		t.Error("under a directory that all can write: accepted")
	}
	os.Chmod(filepath.Join(dir, "a"), 0o755)
	if err := os.Chown(filepath.Join(dir, "a"), 1000, 1000); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(dir, "a", "b"), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	for _, d := range []string{"a/b", "link"} {
		if _, err := makeDir(filepath.Join(dir, d)); err == nil {
			t.Errorf("%s: under a user's directory: accepted", d)
		}
	}

	file := filepath.Join(dir, "rootd.sock")
	if err := os.WriteFile(file, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if removeStale(file) == nil {
		t.Error("removed a file that is no socket")
	}
	if b, _ := os.ReadFile(file); string(b) != "precious" {
		t.Error("the file is gone")
	}
}

// Users reach the socket whatever umask root has (027 and 077 are what hardened machines set), also where a predecessor left the directory.
func TestSocketDirectoryUmask(t *testing.T) {
	if !nettest.Inside(t) { // it is the whole process's umask, and /run
		return
	}
	nettest.Cover(t, "/run")
	defaultDir := filepath.Dir(rootapi.DefaultSocket)
	other := filepath.Join(t.TempDir(), "a", "b")
	mode := func(dir string) os.FileMode {
		fi, err := os.Stat(dir)
		if err != nil {
			t.Fatal(err)
		}
		return fi.Mode().Perm()
	}
	for _, umask := range []int{0o027, 0o077} {
		old := syscall.Umask(umask)
		for _, dir := range []string{defaultDir, other} {
			if made, err := makeDir(dir); !made || err != nil {
				t.Fatalf("%s: %v, %v", dir, made, err)
			}
			if m := mode(dir); m != 0o755 || dir == other && mode(filepath.Dir(dir)) != 0o755 {
				t.Errorf("umask %o: %s has mode %o", umask, dir, m)
			}
		}
		syscall.Umask(old)
		for _, dir := range []string{defaultDir, other} {
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			if _, err := makeDir(dir); err != nil {
				t.Fatal(err)
			}
			if m := mode(dir); (m == 0o755) != (dir == defaultDir) {
				t.Errorf("left over: %s has mode %o", dir, m)
			}
			if err := os.Remove(dir); err != nil {
				t.Fatal(err)
			}
		}
		_ = os.Remove(filepath.Dir(other))
	}
}

// TestBrokenMessages checks what an authorised but broken peer gets: an answer that says why, and an end.
func TestBrokenMessages(t *testing.T) {
	if !nettest.Inside(t) {
		return
	}
	socket := running(t)
	var conn net.Conn
	dial := func() *net.UnixConn {
		nettest.Poll(t, 5*time.Second, "connected", func() bool {
			c, err := net.Dial("unixpacket", socket)
			conn = c
			return err == nil
		})
		t.Cleanup(func() { conn.Close() })
		return conn.(*net.UnixConn)
	}
	buf := make([]byte, rootapi.MaxPacket)
	for _, bad := range []string{
		`{`, `{"id":1,"op":"format-disk"}`, `{"id":1,"op":"set-network","network":{"name":"eth0"}}`, `{"id":1,"op":"reply"}`, `{"id":1,"op":"ping"}`,
		strings.Repeat("x", rootapi.MaxPacket+1),
	} {
		c := dial()
		if _, err := c.Write([]byte(bad)); err != nil {
			t.Fatal(err)
		}
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		m, _, err := rootapi.Receive(c, buf, false)
		if err == nil {
			if m.Op != rootapi.OpReply || m.Error == nil || m.Error.Kind != uerr.Usage {
				t.Errorf("%.40s: answered by %+v", bad, m)
			}
			_, _, err = rootapi.Receive(c, buf, false)
		}
		if err == nil {
			t.Errorf("%.40s: connection still open", bad)
		}
	}
	// Descriptors that a peer sends along are dropped, and the request answered.
	c := dial()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := rootapi.Send(c, rootapi.Message{ID: 1, Op: rootapi.OpVersion}, w); err != nil {
		t.Fatal(err)
	}
	if m, _, err := rootapi.Receive(c, buf, false); err != nil || m.Version == nil {
		t.Errorf("%+v, %v", m, err)
	}
	w.Close()
	r.SetReadDeadline(time.Now().Add(5 * time.Second))
	if _, err := r.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, syscall.EAGAIN) {
		t.Errorf("the descriptor is still open somewhere: %v", err)
	}
}
