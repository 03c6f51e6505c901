// Package storetest owns the databases that tests of the relay run on: files, and a PostgreSQL of their own.
package storetest

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"
)

// nobody runs PostgreSQL, which refuses root.
const nobody = 65534

// startTimeout bounds how long a server may take until it answers.
const startTimeout = 30 * time.Second

// Both runs a test on each kind of database; source returns the name of a new and empty one.
func Both(t *testing.T, fn func(t *testing.T, source func(t *testing.T) string)) {
	t.Helper()
	t.Run("sqlite", func(t *testing.T) {
		fn(t, func(t *testing.T) string { return filepath.Join(t.TempDir(), "relay.db") })
	})
	t.Run("postgres", func(t *testing.T) { fn(t, Postgres) })
}

// server is a PostgreSQL of this process's own, on a unix socket and for as long as the process runs.
var server struct {
	once sync.Once
	dir  string
	err  error
	stop chan struct{} // closed by Stop
	done chan struct{} // closed when the server has ended; nil: none was started

	mu sync.Mutex
	// guarded by mu
	databases int
}

var errMissing = errors.New("there is no PostgreSQL on this machine: make deps")

// Postgres returns the URL of a new database of a PostgreSQL that the first test starts.
func Postgres(t *testing.T) string {
	t.Helper()
	server.once.Do(func() { server.err = start() })
	if errors.Is(server.err, errMissing) {
		t.Skip(server.err)
	}
	if server.err != nil {
		t.Fatal(server.err)
	}
	server.mu.Lock()
	server.databases++
	name := fmt.Sprintf("relay%d", server.databases)
	server.mu.Unlock()
	db, err := sql.Open("pgx", url("postgres")) // the driver that package store registers
	if err == nil {
		_, err = db.ExecContext(t.Context(), "CREATE DATABASE "+name)
		err = errors.Join(err, db.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	return url(name)
}

func url(database string) string {
	return "postgres:///" + database + "?user=postgres&host=" + server.dir
}

// Stop ends the server, if there is one; TestMain calls it.
func Stop() {
	if server.done != nil {
		close(server.stop)
		<-server.done
	}
	if server.dir != "" {
		_ = os.RemoveAll(server.dir)
	}
}

// programs finds where initdb and postgres are: installed, or unpacked by make deps; root is where it was unpacked.
func programs() (bin, root string, err error) {
	dir, err := os.Getwd() // of the test's package
	for ; err == nil && dir != filepath.Dir(dir); dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
	}
	unpacked := filepath.Join(dir, "bin/tools/postgres")
	for _, root := range []string{"/", unpacked} {
		found, _ := filepath.Glob(filepath.Join(root, "usr/lib/postgresql/*/bin/initdb"))
		if len(found) > 0 {
			slices.Sort(found)
			return filepath.Dir(found[len(found)-1]), root, nil
		}
	}
	return "", "", errMissing
}

func start() error {
	bin, root, err := programs()
	if err != nil {
		return err
	}
	if server.dir, err = os.MkdirTemp("", "pg"); err != nil { // short: the socket's path has to be
		return err
	}
	data := filepath.Join(server.dir, "data")
	command := func(ctx context.Context, program string, args ...string) *exec.Cmd {
		c := exec.CommandContext(ctx, filepath.Join(bin, program), args...)
		c.Dir = server.dir
		c.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C.UTF-8"}
		if root != "/" {
			libs, _ := filepath.Glob(filepath.Join(root, "usr/lib/*-linux-gnu"))
			c.Env = append(c.Env, "LD_LIBRARY_PATH="+filepath.Join(libs...))
		}
		asNobody(c)
		return c
	}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if out, err := command(ctx, "initdb", "-D", data, "-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-sync").CombinedOutput(); err != nil {
		return fmt.Errorf("initdb: %w\n%s", err, out)
	}
	cmd := command(context.Background(), "postgres", "-D", data, "-k", server.dir, "-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200")
	if err := run(cmd); err != nil {
		return err
	}
	db, err := sql.Open("pgx", url("postgres"))
	if err != nil {
		return err
	}
	defer db.Close()
	for {
		if err = db.PingContext(ctx); err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("PostgreSQL does not answer: %w", err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// run starts the server from a thread that lives as long as it: the kernel ends it with that thread, and so with this process, however that ends.
func run(cmd *exec.Cmd) error {
	started := make(chan error)
	server.stop, server.done = make(chan struct{}), make(chan struct{})
	go func() {
		defer close(server.done)
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		<-server.stop
		_ = cmd.Process.Signal(os.Interrupt) // "fast": connections are cut
		_ = cmd.Wait()
	}()
	return <-started
}
