package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	protocol "github.com/doppel-dev/doppel/internal/wire"
)

// crowdAgents is what the helper is told that plays the agents.
type crowdAgents struct {
	Manager string
	Key     string
	Agents  []crowdAgent
}

type crowdAgent struct {
	Pod, Namespace, Token string
}

// crowdTable is a table that one of them was sent.
type crowdTable struct {
	Pod  string    `json:"pod"` // NAMESPACE/NAME
	At   time.Time `json:"at"`
	UIDs []string  `json:"uids"` // of intercepts
}

// crowdHelper plays agents: it takes tables, prints each as a line, and says the nonces on the manager's connections. Their addresses are all the node's.
func crowdHelper(file string) int {
	start, err := readJSON[crowdAgents](file)
	if err != nil || start == nil {
		fmt.Fprintln(os.Stderr, file, err)
		return 1
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var mu sync.Mutex
	lines, nonces := json.NewEncoder(os.Stdout), map[netip.AddrPort]string{}
	l, err := net.Listen("tcp4", fmt.Sprintf(":%d", crowdPort))
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			from := c.RemoteAddr().(*net.TCPAddr).AddrPort()
			mu.Lock()
			nonce := nonces[netip.AddrPortFrom(from.Addr().Unmap(), from.Port())]
			mu.Unlock()
			_, _ = io.WriteString(c, nonce)
			_ = c.Close()
		}
	}()
	for _, a := range start.Agents {
		id, err := tunnel.NewIdentity(a.Pod)
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		take := func(_ context.Context, method string, body []byte) (any, error) {
			switch method {
			case control.ManagerIntercepts:
				var table control.Table
				if err := json.Unmarshal(body, &table); err != nil {
					return nil, err
				}
				line := crowdTable{Pod: a.Namespace + "/" + a.Pod, At: time.Now()}
				for _, e := range table.Items {
					line.UIDs = append(line.UIDs, e.Intercept)
				}
				mu.Lock()
				defer mu.Unlock()
				return struct{}{}, lines.Encode(line)
			case control.ManagerCanary:
				var c control.Canary
				if err := json.Unmarshal(body, &c); err != nil {
					return nil, err
				}
				mu.Lock()
				defer mu.Unlock()
				nonces[c.Source] = c.Nonce
				return struct{}{}, nil
			}
			return nil, errors.New("unknown method")
		}
		link := tunnel.NewLink(tunnel.LinkConfig{
			Dial: func(ctx context.Context, _ *mux.Session) (*mux.Session, protocol.HelloReply, error) {
				raw, err := (&net.Dialer{Timeout: 5 * time.Second}).DialContext(ctx, "tcp", start.Manager)
				if err != nil {
					return nil, protocol.HelloReply{}, err
				}
				return tunnel.Client(ctx, raw, tunnel.ClientConfig{
					Identity: id, Peer: start.Key, Hello: protocol.Hello{Version: protocol.Version, Role: protocol.RoleAgent, Token: a.Token, Pod: a.Pod, Namespace: a.Namespace},
				})
			},
			Serve: func(ctx context.Context, s *mux.Session) error {
				return tunnel.Serve(ctx, s, tunnel.Handlers{Control: take})
			},
			Permanent: func(error) bool { return false },
			Log:       slog.New(slog.DiscardHandler),
		})
		go func() { _ = link.Run(ctx) }()
	}
	<-stdinEnds()
	return 0
}

// seenTables are the tables that agents have.
type seenTables struct {
	mu sync.Mutex
	// guarded by mu
	last map[string]crowdTable
	next chan struct{} // closed at each change
}

func startSeen(t *testing.T, c *cluster, file string) *seenTables {
	t.Helper()
	s := &seenTables{last: map[string]crowdTable{}, next: make(chan struct{})}
	cmd := exec.Command(c.bin("lab"), "--name", labName, "node", "exec", "--", "env", envHelper+"=crowd", ok(os.Executable())(t), file)
	cmd.Stderr = os.Stderr
	in, lines := ok(cmd.StdinPipe())(t), ok(cmd.StdoutPipe())(t)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	read := make(chan struct{})
	t.Cleanup(func() {
		_ = in.Close()
		<-read
		_ = cmd.Wait() // ended by us
	})
	go func() {
		defer close(read)
		for dec := json.NewDecoder(lines); ; {
			var line crowdTable
			if dec.Decode(&line) != nil {
				return
			}
			s.mu.Lock()
			s.last[line.Pod] = line
			close(s.next)
			s.next = make(chan struct{})
			s.mu.Unlock()
		}
	}()
	return s
}

func (s *seenTables) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.last)
}

// wait returns when the agent of a pod had a table with an intercept, or without it.
func (s *seenTables) wait(t *testing.T, pod, uid string, with bool) time.Time {
	t.Helper()
	limit := time.After(time.Minute)
	for {
		s.mu.Lock()
		last, next := s.last[pod], s.next
		s.mu.Unlock()
		if slices.Contains(last.UIDs, uid) == with {
			return last.At
		}
		select {
		case <-next:
		case <-limit:
			t.Fatalf("after a minute the agent of %s has not heard of intercept %s (%v)", pod, uid, with)
		}
	}
}
