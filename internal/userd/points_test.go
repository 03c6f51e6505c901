package userd

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// The files of an intercept are its own for as long as it lives, also beside one of the same name in another connection.
func TestPointsOfConnections(t *testing.T) {
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	mounts := filepath.Join(localapi.Dir(), "mounts")
	shared := &points{}
	copied := func(name string) (*cluster, *session) {
		c := newCluster(t)
		c.env, c.volume = &control.Environment{Container: "app", Volumes: []control.Volume{{Path: "/data", ReadOnly: true}}}, t.TempDir()
		if err := os.WriteFile(filepath.Join(c.volume, "of"), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		s := c.session()
		s.cfg.name, s.cfg.points = name, shared
		c.start(s)
		return c, s
	}
	intercept := func(c *cluster, s *session, req localapi.MountRequest) outcome {
		t.Helper()
		req.Copy = true
		c.mu.Lock()
		n := c.count
		c.mu.Unlock()
		done := create(t.Context(), s, localapi.InterceptRequest{Name: "web", Ports: []string{"3000"}, Mount: req})
		c.until("it was created", func() bool { c.mu.Lock(); defer c.mu.Unlock(); return c.count > n })
		c.mu.Lock()
		uid := fmt.Sprintf("intercepts-%d", c.count)
		c.mu.Unlock()
		c.say(uid, "Active", "", "")
		return <-done
	}
	expect := func(point, of string) {
		t.Helper()
		if b, err := os.ReadFile(filepath.Join(point, "data", "of")); err != nil || string(b) != of {
			t.Errorf("in %s there are the files of %q, %v", point, b, err)
		}
	}
	one, first := copied("prod")
	two, second := copied("stage/eu")
	at := filepath.Join(mounts, "web")
	if o := intercept(one, first, localapi.MountRequest{}); o.err != nil || o.in.Mount.Point != at {
		t.Fatalf("%+v, %v", o.in.Mount, o.err)
	}
	o := intercept(two, second, localapi.MountRequest{Point: at})
	wantError(t, o.err, uerr.Conflict, at+" has the volumes of intercept web", "--mount PATH")
	if o := intercept(two, second, localapi.MountRequest{}); o.err != nil || o.in.Mount.Point != at+"@stage%2Feu" {
		t.Fatalf("%+v, %v", o.in.Mount, o.err)
	} else {
		expect(o.in.Mount.Point, "stage/eu")
	}
	expect(at, "prod")
	for _, s := range []*session{first, second} {
		if err := leave(t, s, "web"); err != nil {
			t.Fatal(err)
		}
	}
	if o := intercept(two, second, localapi.MountRequest{}); o.err != nil || o.in.Mount.Point != at {
		t.Fatalf("%+v, %v", o.in.Mount, o.err)
	}
	expect(at, "stage/eu") // a copy that nobody has any more gives way
}

// One directory by two names is one mount point.
func TestPoints(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(dir, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	var p points
	free, err := p.take(filepath.Join(dir, "not", "there"), "web")
	if err != nil {
		t.Fatal(err)
	}
	again := func() (func(), error) { return p.take(filepath.Join(dir, "link", "not", "there"), "db") }
	_, err = again()
	wantError(t, err, uerr.Conflict, "has the volumes of intercept web", "doppel leave web")
	free()
	if _, err := again(); err != nil {
		t.Error(err)
	}
}

// Different names are different files below one directory, and ordinary names are themselves.
func TestPointName(t *testing.T) {
	seen := map[string]string{}
	for _, name := range []string{"web", "a/b", "a_b", "a%2Fb", "a@b", "a%40b", ".", "..", "%2E", ".web", "a\x00b"} {
		got := pointName(name)
		if other, twice := seen[got]; twice || filepath.Base(got) != got || filepath.Join("d", got) != "d/"+got {
			t.Errorf("%q is %q, as is %q", name, got, other)
		}
		seen[got] = name
	}
	if seen["web"] != "web" || seen["a_b"] != "a_b" {
		t.Errorf("%v", seen)
	}
}
