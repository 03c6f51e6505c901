package e2e

import (
	"bufio"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"sync"
	"testing"
	"time"
)

// fetchSize is what fetch downloads, and fetchRate at how many bytes a second the server sends.
const (
	fetchSize = 48 << 20
	fetchRate = 8 << 20
)

// serveHelper is a server in the cluster with services chosen by a connection's first byte: "e" echoes lines, "f" sends
// fetchSize bytes, which are numbers, as slowly as a network would, "d" sends them at once.
func serveHelper(addr string) int {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	fmt.Println("listening")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = l.Close()
	}()
	for {
		c, err := l.Accept()
		if err != nil {
			return 0
		}
		go func() {
			defer c.Close()
			kind := make([]byte, 1)
			if _, err := io.ReadFull(c, kind); err != nil {
				return
			}
			if kind[0] == 'e' {
				_, _ = io.Copy(c, c)
				return
			}
			const chunk = 64 << 10
			tick := time.NewTicker(time.Second * chunk / fetchRate)
			defer tick.Stop()
			buf := make([]byte, chunk)
			for n := uint64(0); n < fetchSize/8; {
				for i := 0; i < len(buf); i += 8 {
					binary.BigEndian.PutUint64(buf[i:], n)
					n++
				}
				if _, err := c.Write(buf); err != nil {
					return
				}
				if kind[0] == 'f' {
					<-tick.C
				}
			}
		}()
	}
}

// keepHelper keeps one connection, says something on it every 20 ms once the answer to the last is there, and prints a line for
// each answer; at the end why the connection ended.
func keepHelper(addr string) int {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		fmt.Println("ended:", err)
		return 1
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}()
	_, _ = io.WriteString(c, "e")
	for r, n := bufio.NewReader(c), 0; ; n++ {
		if _, err := fmt.Fprintln(c, n); err != nil {
			fmt.Println("ended:", err)
			return 0
		}
		line, err := r.ReadString('\n')
		if err != nil || line != fmt.Sprintln(n) {
			fmt.Printf("ended: %q %v\n", line, err)
			return 0
		}
		fmt.Print(line)
		time.Sleep(20 * time.Millisecond)
	}
}

// fetchHelper downloads and checks every byte. It prints a line when the first have come, and one at the end.
func fetchHelper(addr string) int { return fetch(addr, "f") }

// downloadHelper is the same as fast as it goes.
func downloadHelper(addr string) int { return fetch(addr, "d") }

func fetch(addr, kind string) int {
	c, err := net.DialTimeout("tcp", addr, 10*time.Second)
	if err != nil {
		fmt.Println("ended:", err)
		return 1
	}
	_, _ = io.WriteString(c, kind)
	r := bufio.NewReaderSize(c, 64<<10)
	b := make([]byte, 8)
	for n := uint64(0); n < fetchSize/8; n++ {
		if _, err := io.ReadFull(r, b); err != nil || binary.BigEndian.Uint64(b) != n {
			fmt.Printf("ended: at byte %d: %x, %v\n", 8*n, b, err)
			return 0
		}
		if n == 0 {
			fmt.Println("began")
		}
	}
	_, err = r.ReadByte()
	fmt.Println("complete:", err)
	return 0
}

// lines is a helper whose lines are read as they come.
type lines struct {
	cmd  *exec.Cmd
	in   io.Closer
	read chan struct{}

	mu sync.Mutex
	// guarded by mu
	all []string
}

// startLines starts a helper; full is the command up to the helper itself.
func startLines(t *testing.T, cmd func(ctx context.Context, args ...string) *exec.Cmd, helper, arg string) *lines {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	l := &lines{cmd: cmd(context.Background(), "env", envHelper+"="+helper, self, arg), read: make(chan struct{})}
	if l.in, err = l.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := l.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	l.cmd.Stderr = os.Stderr
	if err := l.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(l.read)
		for sc := bufio.NewScanner(out); sc.Scan(); {
			l.mu.Lock()
			l.all = append(l.all, sc.Text())
			l.mu.Unlock()
		}
	}()
	t.Cleanup(l.stop)
	l.more(t, 1, 20*time.Second)
	return l
}

func (l *lines) stop() {
	_ = l.in.Close()
	_ = l.cmd.Process.Signal(os.Interrupt)
	<-l.read
	_ = l.cmd.Wait() // ended by us
}

func (l *lines) get() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all
}

// last is the newest line.
func (l *lines) last() string {
	all := l.get()
	if len(all) == 0 {
		return ""
	}
	return all[len(all)-1]
}

// more waits for n further lines, none of which may say that the connection ended.
func (l *lines) more(t *testing.T, n int, limit time.Duration) {
	t.Helper()
	from := len(l.get())
	eventually(t, limit, func() error {
		if s := l.last(); strings.HasPrefix(s, "ended") {
			t.Fatal(s)
		}
		if got := len(l.get()) - from; got < n {
			return fmt.Errorf("%d of %d lines", got, n)
		}
		return nil
	})
}

// quiet waits until no line has come for a moment.
func (l *lines) quiet(t *testing.T) {
	t.Helper()
	seen := -1
	eventually(t, 10*time.Second, func() error {
		if n := len(l.get()); n != seen {
			seen = n
			return fmt.Errorf("line %d has just come", n)
		}
		return nil
	})
}
