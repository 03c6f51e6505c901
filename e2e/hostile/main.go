// Command hostile is what means harm inside a cluster.
//
// It speaks the tunnel's protocol and tells how far it got; its input says what it is to try.
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/doppel-dev/doppel/e2e/hostile/plan"
	"github.com/doppel-dev/doppel/internal/agentcfg"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

func main() {
	var p plan.Plan
	err := json.NewDecoder(os.Stdin).Decode(&p)
	if err == nil {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		err = run(ctx, p)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "hostile:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, p plan.Plan) error {
	switch {
	case p.Silent > 0:
		return silent(p)
	case p.Call:
		return call(ctx, p)
	}
	raw, err := dial(ctx, p.Addr, p.Path)
	if err != nil {
		return err
	}
	cfg := tunnel.ClientConfig{Peer: p.Peer, Hello: p.Hello}
	if p.Key != "" {
		if cfg.Identity, err = tunnel.ParseIdentity([]byte(p.Key)); err != nil {
			return err
		}
	}
	s, _, err := tunnel.Client(ctx, raw, cfg)
	if err != nil {
		fmt.Println("hello:", verdict(err))
		return nil
	}
	fmt.Println("hello: accepted")
	// It takes what an agent is told, so that the manager does not hang up.
	take := func(_ context.Context, _ string, body []byte) (any, error) {
		if bytes.Contains(body, []byte(p.Secret)) {
			fmt.Printf("TOLD %s\n", body)
		}
		return struct{}{}, nil
	}
	go func() { _ = tunnel.Serve(ctx, s, tunnel.Handlers{Control: take}) }()
	for _, a := range p.Attempts {
		fmt.Printf("%s: %s\n", a.Name, try(ctx, s, a))
	}
	return nil
}

// try opens a stream, says something on it if there is something to say, and reads what comes.
func try(ctx context.Context, s *mux.Session, a plan.Attempt) string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, _, err := s.Open(ctx, a.Open)
	if err != nil {
		return verdict(err)
	}
	defer st.Close()
	_ = st.SetDeadline(time.Now().Add(2 * time.Second))
	b := make([]byte, 200)
	n, err := st.Read(b)
	if n == 0 && err != nil {
		return "opened, then " + verdict(err)
	}
	return fmt.Sprintf("ANSWERED %q", b[:n])
}

func verdict(err error) string {
	var no *mux.RejectError
	if errors.As(err, &no) {
		return "refused: " + no.Msg
	}
	return "ended: " + err.Error()
}

// dial connects, by way of HTTP if there is a path.
func dial(ctx context.Context, addr, path string) (net.Conn, error) {
	if path == "" {
		return (&net.Dialer{}).DialContext(ctx, "tcp", addr)
	}
	return tunnel.Upgrade(ctx, &http.Transport{DisableCompression: true}, "http://"+addr+path)
}

// call says to an agent that it is the manager, whose key it lacks.
func call(ctx context.Context, p plan.Plan) error {
	raw, err := dial(ctx, p.Addr, agentcfg.CallPath)
	if err != nil {
		return err
	}
	id, err := tunnel.NewIdentity("traffic-manager")
	if err != nil {
		return err
	}
	_, _, err = tunnel.Server(ctx, raw, tunnel.ServerConfig{Identity: id, Authorize: func(_ context.Context, h wire.Hello, _ string) (wire.HelloReply, error) {
		fmt.Printf("TOLD %+v\n", h)
		return wire.HelloReply{}, nil
	}})
	fmt.Println("call:", verdict(err))
	return nil
}

// silent holds connections on which nothing comes, or the beginning of something, until its input ends.
func silent(p plan.Plan) error {
	var held []net.Conn
	for i := range p.Silent {
		c, err := net.Dial("tcp", p.Addr)
		if err != nil {
			return fmt.Errorf("connection %d: %w", i, err)
		}
		held = append(held, c)
		if i%2 == 1 {
			_, _ = io.WriteString(c, p.Begin)
		}
	}
	fmt.Printf("holding %d\n", len(held))
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}
