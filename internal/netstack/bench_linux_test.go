package netstack_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"os/signal"
	"runtime/pprof"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/flow"
	"github.com/doppel-dev/doppel/internal/netstack"
	"github.com/doppel-dev/doppel/internal/nettest"
	"github.com/doppel-dev/doppel/internal/tundev"
)

const (
	envStack   = "DOPPEL_BENCH_STACK"
	envProfile = "DOPPEL_BENCH_PROFILE" // a file for the stack's CPU profile
)

func TestMain(m *testing.M) {
	if os.Getenv(envStack) != "" {
		benchStack()
		return
	}
	os.Exit(m.Run())
}

// benchStack is the daemon of the benchmarks: a process of its own, so that its CPU time can be told from the application's. Its flows end in
// memory: port 1 discards, port 2 gives zeros without end, port 3 echoes. It prints its CPU time for every line it reads.
func benchStack() {
	if p := os.Getenv(envProfile); p != "" {
		f, err := os.Create(p)
		if err != nil {
			panic(err)
		}
		pprof.StartCPUProfile(f)
		defer pprof.StopCPUProfile()
	}
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	s, err := netstack.New(netstack.Config{Device: os3(), DialTCP: func(_ context.Context, _, dst netip.AddrPort) (flow.Stream, error) {
		return newMemStream(dst.Port()), nil
	}})
	if err != nil {
		panic(err)
	}
	go func() {
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			var ru syscall.Rusage
			syscall.Getrusage(syscall.RUSAGE_SELF, &ru)
			fmt.Println(time.Duration(ru.Utime.Nano()+ru.Stime.Nano()).Nanoseconds(), ru.Maxrss)
		}
		cancel()
	}()
	s.Run(ctx)
}

// os3 is the TUN that the benchmark passed as descriptor 3, as rootd does.
func os3() *tundev.Device {
	dev, err := tundev.New(os.NewFile(3, "tun"))
	if err != nil {
		panic(err)
	}
	return dev
}

type memStream struct {
	port  uint16
	c     chan []byte
	done  chan struct{}
	close sync.Once
	rest  []byte
}

func newMemStream(port uint16) *memStream {
	return &memStream{port: port, c: make(chan []byte, 1), done: make(chan struct{})}
}

func (m *memStream) Read(p []byte) (int, error) {
	switch m.port {
	case 2:
		select {
		case <-m.done:
			return 0, io.EOF
		default:
			return len(p), nil
		}
	case 3:
		if len(m.rest) == 0 {
			select {
			case m.rest = <-m.c:
			case <-m.done:
				return 0, io.EOF
			}
		}
		n := copy(p, m.rest)
		m.rest = m.rest[n:]
		return n, nil
	}
	<-m.done
	return 0, io.EOF
}

func (m *memStream) Write(p []byte) (int, error) {
	if m.port == 3 {
		m.c <- append([]byte(nil), p...)
	}
	return len(p), nil
}

func (m *memStream) CloseWrite() error { m.Reset(); return nil }
func (m *memStream) Close() error      { m.Reset(); return nil }
func (m *memStream) Reset()            { m.close.Do(func() { close(m.done) }) }

// stackProcess starts the daemon and returns a reader of its CPU time and peak memory (KiB).
func stackProcess(b *testing.B) func() (time.Duration, int) {
	b.Helper()
	f := openTUNFile(b)
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), envStack+"=1")
	cmd.ExtraFiles = []*os.File{f}
	cmd.Stderr = os.Stderr
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	f.Close()
	b.Cleanup(func() { in.Close(); cmd.Wait() })
	lines := bufio.NewReader(out)
	return func() (time.Duration, int) {
		fmt.Fprintln(in)
		var ns int64
		var rss int
		if _, err := fmt.Fscanln(lines, &ns, &rss); err != nil {
			b.Fatal(err)
		}
		return time.Duration(ns), rss
	}
}

func BenchmarkTUN(b *testing.B) {
	if !nettest.Inside(b) {
		return
	}
	usage := stackProcess(b)
	const bulk = 2 << 30
	for _, bench := range []struct {
		name  string
		port  string
		conns int
	}{{"up", "1", 1}, {"up", "1", 4}, {"down", "2", 1}, {"down", "2", 4}} {
		b.Run(fmt.Sprintf("%s/%d", bench.name, bench.conns), func(b *testing.B) {
			var wg sync.WaitGroup
			before, _ := usage()
			began := time.Now()
			for range bench.conns {
				wg.Go(func() {
					c, err := net.Dial("tcp", host4+":"+bench.port)
					if err != nil {
						b.Error(err)
						return
					}
					defer c.Close()
					if n := move(c, bench.port == "1", bulk/bench.conns); n < bulk/bench.conns {
						b.Errorf("moved %d", n)
					}
				})
			}
			wg.Wait()
			took := time.Since(began)
			after, rss := usage()
			b.ReportMetric(bulk*8/took.Seconds()/1e9, "Gbit/s")
			b.ReportMetric((after-before).Seconds()/(bulk/1e9), "daemon-cpu-s/GB")
			b.ReportMetric(float64(rss)/1024, "daemon-MiB")
		})
	}
	b.Run("echo", func(b *testing.B) {
		c, err := net.Dial("tcp", host4+":3")
		if err != nil {
			b.Fatal(err)
		}
		defer c.Close()
		buf := make([]byte, 100)
		const n = 20000
		before, _ := usage()
		began := time.Now()
		for range n {
			c.Write(buf)
			io.ReadFull(c, buf)
		}
		after, _ := usage()
		b.ReportMetric(float64(time.Since(began).Microseconds())/n, "us/echo")
		b.ReportMetric(float64((after-before).Microseconds())/n, "daemon-cpu-us/echo")
	})
	b.Run("connect", func(b *testing.B) {
		const n, workers = 5000, 8
		var done atomic.Int64
		var wg sync.WaitGroup
		before, _ := usage()
		began := time.Now()
		for range workers {
			wg.Go(func() {
				for done.Add(1) <= n {
					c, err := net.Dial("tcp", host4+":3")
					if err != nil {
						b.Error(err)
						return
					}
					c.Close()
				}
			})
		}
		wg.Wait()
		took := time.Since(began)
		after, rss := usage()
		b.ReportMetric(n/took.Seconds(), "conns/s")
		b.ReportMetric(float64((after-before).Microseconds())/n, "daemon-cpu-us/conn")
		b.ReportMetric(float64(rss)/1024, "daemon-MiB")
	})
	b.Run("idle", func(b *testing.B) {
		const n = 1000
		_, before := usage()
		for range n {
			c, err := net.Dial("tcp", host4+":3")
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			c.Write([]byte("x"))
			io.ReadFull(c, make([]byte, 1))
		}
		_, after := usage()
		b.ReportMetric(float64(after-before)/1024, "daemon-MiB/1000-flows")
	})
}

func move(c net.Conn, up bool, n int) int {
	buf := make([]byte, 256<<10)
	done := 0
	for done < n {
		var m int
		var err error
		if up {
			m, err = c.Write(buf)
		} else {
			m, err = c.Read(buf)
		}
		done += m
		if err != nil {
			break
		}
	}
	return done
}
