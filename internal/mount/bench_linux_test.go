package mount

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/sftpd"
)

// The benchmarks compare this file system with sshfs over the same kind of stream to the same server, each with a directory of its own.
// The page cache of the machine under it is warm; that of the mount is cold in each round. What reads and writes is another process, as anywhere:
// a goroutine of this one that waits for a file system of its own would keep a processor from it. Figures are medians.

func socketpair(b *testing.B) (here, there *os.File) {
	b.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		b.Fatal(err)
	}
	return os.NewFile(uintptr(fds[0]), "here"), os.NewFile(uintptr(fds[1]), "there")
}

func serve(b *testing.B, dir string) *os.File {
	b.Helper()
	here, there := socketpair(b)
	c, err := net.FileConn(there)
	_ = there.Close()
	if err != nil {
		b.Fatal(err)
	}
	go func() { _ = sftpd.Serve(c, []sftpd.Export{{Path: "/data", Dir: dir}}, slog.New(slog.DiscardHandler)) }()
	return here
}

func mountOurs(b *testing.B, dir, point string) (unmount func()) {
	b.Helper()
	m, err := Mount(b.Context(), Config{Point: point, Source: "bench", Dial: func(context.Context) (io.ReadWriteCloser, error) {
		f := serve(b, dir)
		defer f.Close()
		return net.FileConn(f)
	}})
	if err != nil {
		b.Fatal(err)
	}
	return func() {
		m.Close()
		<-m.Gone()
	}
}

func mountSSHFS(b *testing.B, dir, point string) (unmount func()) {
	b.Helper()
	if _, err := exec.LookPath("sshfs"); err != nil {
		b.Skip("sshfs is not installed")
	}
	f := serve(b, dir)
	defer f.Close()
	cmd := exec.Command("sshfs", "-f", "-o", "passive", ":/", point)
	cmd.Stdin, cmd.Stdout = f, f
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(point, "data")); err == nil {
			break
		}
		if time.Since(start) > 10*time.Second {
			b.Fatal("sshfs did not mount")
		}
	}
	return func() {
		_ = unmountCommand(point).Run()
		_ = cmd.Wait()
	}
}

var mounters = []struct {
	name  string
	mount func(b *testing.B, dir, point string) func()
}{{"doppel", mountOurs}, {"sshfs", mountSSHFS}}

// compare runs a workload on both, by turns.
func compare(b *testing.B, bytes int64, prepare func(dir string) error, work func(dir string) error) {
	took := times{}
	for range b.N {
		for _, m := range mounters {
			dir, point := b.TempDir(), b.TempDir()
			if err := prepare(dir); err != nil {
				b.Fatal(err)
			}
			unmount := m.mount(b, dir, point)
			start := time.Now()
			err := work(filepath.Join(point, "data"))
			took.add(m.name, start)
			unmount()
			if err != nil {
				b.Fatal(m.name, err)
			}
			_ = os.RemoveAll(dir)
		}
	}
	took.report(b, bytes)
}

// times are how long rounds took, by name.
type times map[string][]time.Duration

func (t times) add(name string, start time.Time) { t[name] = append(t[name], time.Since(start)) }

func (t times) median(name string) time.Duration {
	slices.Sort(t[name])
	return t[name][len(t[name])/2]
}

func (t times) report(b *testing.B, bytes int64) {
	b.Helper()
	for _, m := range mounters {
		b.ReportMetric(float64(t.median(m.name).Microseconds())/1e3, m.name+"-ms")
		if bytes > 0 {
			b.ReportMetric(float64(bytes)/1e6/t.median(m.name).Seconds(), m.name+"-MB/s")
		}
	}
	b.ReportMetric(float64(t.median("sshfs"))/float64(t.median("doppel")), "times-faster")
}

// readAll has files read at once, each by a process of its own. TestContents looks at what is read.
func readAll(names ...string) error {
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() { errs[i] = exec.Command("dd", "if="+n, "of=/dev/null", "bs=1M").Run() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

func benchSize() int {
	if testing.Short() {
		return 4 << 20
	}
	return 100 << 20
}

func BenchmarkRead(b *testing.B) {
	want := bytes.Repeat([]byte("0123456789abcdef"), benchSize()/16)
	compare(b, int64(len(want)), func(dir string) error { return os.WriteFile(filepath.Join(dir, "f"), want, 0o644) }, func(dir string) error {
		return readAll(filepath.Join(dir, "f"))
	})
}

func BenchmarkWrite(b *testing.B) {
	from := filepath.Join(b.TempDir(), "from")
	if err := os.WriteFile(from, bytes.Repeat([]byte("0123456789abcdef"), benchSize()/16), 0o644); err != nil {
		b.Fatal(err)
	}
	for _, block := range []string{"4k", "1M"} {
		b.Run(block, func(b *testing.B) {
			compare(b, int64(benchSize()), func(string) error { return nil }, func(dir string) error {
				return exec.Command("dd", "if="+from, "of="+filepath.Join(dir, "f"), "bs="+block).Run()
			})
		})
	}
}

// BenchmarkParallel reads 3 files of 4 mounts at once.
func BenchmarkParallel(b *testing.B) {
	want := bytes.Repeat([]byte("0123456789abcdef"), benchSize()/4/16)
	took := times{}
	for range b.N {
		for _, m := range mounters {
			var names []string
			var ends []func()
			for range 4 {
				dir, point := b.TempDir(), b.TempDir()
				for _, n := range []string{"1", "2", "3"} {
					if err := os.WriteFile(filepath.Join(dir, n), want, 0o644); err != nil {
						b.Fatal(err)
					}
				}
				ends = append(ends, m.mount(b, dir, point))
				for _, n := range []string{"1", "2", "3"} {
					names = append(names, filepath.Join(point, "data", n))
				}
			}
			start := time.Now()
			err := readAll(names...)
			took.add(m.name, start)
			if err != nil {
				b.Fatal(m.name, err)
			}
			for _, end := range ends {
				end()
			}
		}
	}
	took.report(b, int64(12*len(want)))
}

// BenchmarkWalk looks at 5,000 files in 50 directories, as git status does, or reads them all.
func BenchmarkWalk(b *testing.B) {
	files := 100
	if testing.Short() {
		files = 10
	}
	prepare := func(dir string) error {
		for i := range 50 {
			if err := os.Mkdir(filepath.Join(dir, fmt.Sprint(i)), 0o755); err != nil {
				return err
			}
			for j := range files {
				if err := os.WriteFile(filepath.Join(dir, fmt.Sprint(i), fmt.Sprint(j)), []byte("small"), 0o644); err != nil {
					return err
				}
			}
		}
		return nil
	}
	// Not with the directory as the command's own: this process would enter it before it becomes the command, and wait for itself.
	for name, command := range map[string]string{"lstat": `find "$0" -size +1M`, "read": `grep -rL small "$0"; true`} {
		b.Run(name, func(b *testing.B) {
			compare(b, 0, prepare, func(dir string) error {
				if out, err := exec.Command("sh", "-c", command, dir).CombinedOutput(); err != nil || len(out) > 0 {
					return fmt.Errorf("%.100s, %w", out, err)
				}
				return nil
			})
		})
	}
}
