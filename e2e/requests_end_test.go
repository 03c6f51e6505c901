package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/status"
)

const (
	getAsLou  = "GET / HTTP/1.1\r\nHost: h\r\nX-User: lou\r\n\r\n"
	waitAsLou = "GET /wait/%s HTTP/1.1\r\nHost: h\r\nX-User: lou\r\n\r\n"
)

// answeredBy sends a request of lou's and compares who answers.
func (w *wire) answeredBy(name string) {
	w.t.Helper()
	w.send(getAsLou)
	if got := w.answer("a request of lou's", http.MethodGet); !strings.Contains(got, "X-Name: "+name) {
		w.t.Errorf("answered by %q, not %s", got, name)
	}
}

// running are requests of lou's that are not answered yet, at the local process.
type running struct {
	h1   *wire
	h2   *client
	wait chan error // of HTTP/2
	rpc  pb.TestServiceClient
	both pb.TestService_FullDuplexCallClient
}

// run begins requests that wait for topic.
func (r *requests) run(t *testing.T, topic string) *running {
	t.Helper()
	x := &running{h1: r.connect(t, r.web), h2: r.client(t, 2), wait: make(chan error, 1)}
	x.h1.answeredBy("lou")
	x.h1.send(fmt.Sprintf(waitAsLou, topic))
	go func() {
		_, err := x.h2.ask(t.Context(), "lou", http.MethodGet, "/wait/"+topic, nil)
		x.wait <- err
	}()
	x.rpc, _ = r.rpcClient(t)
	var err error
	if x.both, err = x.rpc.FullDuplexCall(as(t.Context(), "lou")); err != nil {
		t.Fatal(err)
	}
	if err := x.again(); err != nil {
		t.Fatal(err)
	}
	eventually(t, 5*time.Second, func() error {
		if got := r.l.sh(t, "curl -s '127.0.0.1:3000/count?path=/wait/"+topic+"'"); got != "2" {
			return fmt.Errorf("%s requests have come", got)
		}
		return nil
	})
	return x
}

// again sends a message on the gRPC stream and waits for it to come back.
func (x *running) again() error {
	if err := x.both.Send(&pb.StreamingOutputCallRequest{}); err != nil {
		return err
	}
	_, err := x.both.Recv()
	return err
}

// killed ends the local process amid requests: they are reset and nobody answers them again; what comes after is the app's until the process is back.
func (r *requests) killed(t *testing.T) {
	x := r.run(t, "killed")
	idle := r.connect(t, r.web)
	idle.answeredBy("lou")
	r.stop()
	if b, err := io.ReadAll(x.h1.r); len(b) > 0 {
		t.Errorf("HTTP/1: %q %v", b, err)
	}
	if err := <-x.wait; err == nil || strings.Contains(err.Error(), "answered by") {
		t.Errorf("HTTP/2: %v", err)
	}
	if _, err := x.both.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("gRPC: %v", err)
	}
	x.h2.taken = "nobody"
	n, err := x.h2.ask(t.Context(), "lou", http.MethodGet, "/count?path=/wait/killed", nil)
	if n != "0" || err != nil {
		t.Errorf("the app got %s of the requests, %v", n, err)
	}
	idle.answeredBy("app")
	r.connect(t, r.web).answeredBy("app")
	if err := unary(as(t.Context(), "lou"), x.rpc, other); err != nil {
		t.Errorf("gRPC: %v", err)
	}
	r.start(t)
	x.h2.taken = "lou"
	x.h2.who(t, "lou", other)
	idle.answeredBy("lou")
	if n := x.h2.dials.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
	if err := unary(as(t.Context(), "lou"), x.rpc, "lou"); err != nil {
		t.Errorf("gRPC: %v", err)
	}
}

// left ends the intercepts amid requests: those that run have 10 s to end, on the same connections the app gets what comes.
func (r *requests) left(t *testing.T) {
	x, late := r.run(t, "left"), r.run(t, "late")
	ws := r.socket(t, "lou")
	r.l.run(t, "doppel", "leave", "web")
	r.l.run(t, "doppel", "leave", "rpc")
	began := time.Now()
	x.h2.taken, late.h2.taken = "nobody", "nobody"
	x.h2.who(t, "lou", other, "lou")
	if err := unary(as(t.Context(), "lou"), x.rpc, other); err != nil {
		t.Errorf("gRPC: %v", err)
	}
	if err := errors.Join(back(ws, websocket.TextMessage, []byte("still there")), x.again(), x.both.CloseSend()); err != nil {
		t.Error(err)
	}
	if _, err := x.both.Recv(); !errors.Is(err, io.EOF) {
		t.Errorf("gRPC: %v", err)
	}
	x.h1.send(getAsLou) // behind the one that runs
	for range 2 {
		r.l.sh(t, "curl -sf -d in-time 127.0.0.1:3000/say/left")
	}
	if got := x.h1.answer("in time", http.MethodGet); !strings.Contains(got, "X-Name: lou") || !strings.HasSuffix(got, "in-time") {
		t.Errorf("HTTP/1: %q", got)
	}
	if got := x.h1.answer("behind it", http.MethodGet); !strings.Contains(got, "X-Name: app") {
		t.Errorf("HTTP/1: %q", got)
	}
	if err := <-x.wait; err != nil {
		t.Errorf("HTTP/2: %v", err)
	}
	// The rest is cut when the time is over.
	if b, err := io.ReadAll(late.h1.r); len(b) > 0 {
		t.Errorf("HTTP/1: %q %v", b, err)
	}
	if err := <-late.wait; err == nil {
		t.Error("HTTP/2: answered late")
	}
	if _, err := late.both.Recv(); err == nil || errors.Is(err, io.EOF) {
		t.Errorf("gRPC: %v", err)
	}
	if _, _, err := ws.ReadMessage(); err == nil {
		t.Error("the WebSocket goes on")
	}
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("that took %v", took)
	}
	for _, c := range []*client{x.h2, late.h2} {
		c.who(t, "lou", other)
		if n := c.dials.Load(); n != 1 {
			t.Errorf("%d connections", n)
		}
	}
}

// begun has intercepts begin and end while a gRPC client keeps its connection: its next calls go where they should, none fails, and what runs goes on
// where it is.
func (r *requests) begun(t *testing.T) {
	c, dials := r.rpcClient(t)
	ctx := as(t.Context(), "lou")
	if err := unary(ctx, c, other); err != nil {
		t.Fatal(err)
	}
	both, err := c.FullDuplexCall(ctx)
	if err != nil {
		t.Fatal(err)
	}
	x := &running{both: both}
	for _, begins := range []bool{true, false} {
		user := "lou"
		if begins {
			want(t, r.l.run(t, "doppel", "intercept", "rpc", "-w", "web", "-p", "3001:grpc"), "ACTIVE")
		} else {
			r.l.run(t, "doppel", "leave", "rpc")
			user = other
		}
		eventually(t, 5*time.Second, func() error {
			err := unary(ctx, c, user)
			if _, ok := status.FromError(err); ok && err != nil { // not just from whom
				t.Fatal(err)
			}
			return err
		})
		if err := x.again(); err != nil {
			t.Error("the call that runs: ", err)
		}
	}
	if head, err := both.Header(); err != nil || fromWhom(head, other) != nil {
		t.Errorf("the call that runs: %v, %v", head, err)
	}
	if n := dials.Load(); n != 3 {
		t.Errorf("%d connections", n)
	}
}
