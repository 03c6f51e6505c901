package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/gorilla/websocket"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	pb "google.golang.org/grpc/interop/grpc_testing"
	"google.golang.org/grpc/metadata"
)

// patience is how long a caller waits for an answer before it counts as failed.
const patience = 3 * time.Second

// taker is the user whose requests are taken by an intercept, and other one whose are not: the callers of the rest of the team.
const taker = "lou"

// caller is a kind of traffic. Each is there twice, as the requests that an intercept takes and as those that it does not.
type caller struct {
	name string
	rate int // requests a second, of each, at fullRate
	// start returns a function that does one request and says who has answered; began is when what it used was begun, if that is earlier.
	start func(to targets, taken bool) func(context.Context) (who string, began time.Time, err error)
}

// targets are the addresses of the services: ports of raw with even numbers are taken.
type targets struct {
	Web, RPC         string
	Plain            string // a workload without agents
	Taken, Untouched string // TCP and UDP
	Rate             int    // requests a second, in all
}

// plain is the kind of requests that have nothing to do with doppel: what they suffer is the lab's doing, or the fault's own.
const plain = "without doppel"

// callers come to fullRate, with 20 of those.
const fullRate = 500

var callers = []caller{
	{"HTTP/1", 90, http1Caller},
	{"HTTP/2", 60, http2Caller},
	{"gRPC", 40, rpcCaller},
	{"WebSocket", 30, nil},
	{"TCP", 10, rawCaller("tcp")},
	{"UDP", 10, rawCaller("udp")},
}

// trafficHelper calls the services that its argument names as targets, at a steady rate whatever is answered, and prints an answer a line.
func trafficHelper(arg string) int {
	var to targets
	if err := json.Unmarshal([]byte(arg), &to); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		<-stdinEnds()
		cancel()
	}()
	var mu sync.Mutex
	enc := json.NewEncoder(os.Stdout)
	say := func(a answer) {
		if ctx.Err() != nil {
			return // what is running when the traffic ends says nothing
		}
		mu.Lock()
		defer mu.Unlock()
		_ = enc.Encode(a) // an answer that is missing is missed by who reads them
	}
	var wg sync.WaitGroup
	begin := func(kind string, taken bool, rate int, do func(context.Context) (string, time.Time, error)) {
		wg.Go(func() {
			every(ctx, time.Second/time.Duration(rate), func() {
				wg.Go(func() {
					ctx, cancel := context.WithTimeout(ctx, patience)
					defer cancel()
					say(timed(kind, taken, time.Now(), func() (string, time.Time, error) { return do(ctx) }))
				})
			})
		})
	}
	begin(plain, false, 20, http1Caller(targets{Web: to.Plain}, false))
	for _, c := range callers {
		for _, taken := range []bool{false, true} {
			rate := max(c.rate*to.Rate/fullRate, 1)
			if c.start == nil {
				wg.Go(func() { sockets(ctx, to.Web, taken, rate, say) })
				continue
			}
			begin(c.name, taken, rate, c.start(to, taken))
		}
	}
	wg.Wait()
	return 0
}

// every calls fn at each tick until the context ends.
func every(ctx context.Context, d time.Duration, fn func()) {
	tick := time.NewTicker(d)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			fn()
		}
	}
}

// timed does a request.
func timed(kind string, taken bool, start time.Time, do func() (string, time.Time, error)) answer {
	who, began, err := do()
	a := answer{Kind: kind, Taken: taken, Start: start, Took: time.Since(start), Body: who}
	if err != nil {
		a.Err = err.Error()
		if !began.IsZero() { // it was in flight since then
			a.Start, a.Took = began, time.Since(began)
		}
	}
	return a
}

func userOf(taken bool) string {
	if taken {
		return taker
	}
	return other
}

// http1Caller asks on connections that are kept and on new ones in turn.
func http1Caller(to targets, taken bool) func(context.Context) (string, time.Time, error) {
	kept, fresh := httpCaller(to.Web, taken, &http.Transport{MaxIdleConnsPerHost: 32}), httpCaller(to.Web, taken, &http.Transport{DisableKeepAlives: true})
	turn := make(chan bool, 1)
	turn <- false
	return func(ctx context.Context) (string, time.Time, error) {
		mine := <-turn
		turn <- !mine
		if mine {
			return kept(ctx)
		}
		return fresh(ctx)
	}
}

// http2Caller asks on one connection.
func http2Caller(to targets, taken bool) func(context.Context) (string, time.Time, error) {
	tr := &http.Transport{Protocols: new(http.Protocols)}
	tr.Protocols.SetUnencryptedHTTP2(true)
	return httpCaller(to.Web, taken, tr)
}

func httpCaller(web string, taken bool, tr *http.Transport) func(context.Context) (string, time.Time, error) {
	client := &http.Client{Transport: tr}
	return func(ctx context.Context) (who string, began time.Time, err error) {
		// A body that cannot be had twice: no request is sent again behind our back.
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+web+"/", io.NopCloser(strings.NewReader("once")))
		if err != nil {
			return "", began, err
		}
		req.ContentLength = int64(len("once"))
		req.Header.Set("X-User", userOf(taken))
		resp, err := client.Do(req)
		if err != nil {
			return "", began, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err == nil && string(b) != "once" {
			err = fmt.Errorf("status %d, %q came back", resp.StatusCode, b)
		}
		return resp.Header.Get("X-Name"), began, err
	}
}

// rpcCaller makes calls on one connection, which is made anew without the long pauses that are gRPC's default.
func rpcCaller(to targets, taken bool) func(context.Context) (string, time.Time, error) {
	cc, err := grpc.NewClient("passthrough:///"+to.RPC, grpc.WithTransportCredentials(insecure.NewCredentials()), grpc.WithConnectParams(grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1, MaxDelay: 50 * time.Millisecond}, MinConnectTimeout: patience,
	}))
	if err != nil {
		return func(context.Context) (string, time.Time, error) { return "", time.Time{}, err }
	}
	client := pb.NewTestServiceClient(cc)
	return func(ctx context.Context) (string, time.Time, error) {
		got, err := client.UnaryCall(metadata.AppendToOutgoingContext(ctx, "x-user", userOf(taken)), &pb.SimpleRequest{Payload: &pb.Payload{Body: []byte("once")}})
		return got.GetServerId(), time.Time{}, err
	}
}

// rawCaller asks who is there, each time from a port of its own.
func rawCaller(network string) func(targets, bool) func(context.Context) (string, time.Time, error) {
	return func(to targets, taken bool) func(context.Context) (string, time.Time, error) {
		addr := to.Untouched
		if taken {
			addr = to.Taken
		}
		return func(ctx context.Context) (who string, began time.Time, err error) {
			c, err := (&net.Dialer{}).DialContext(ctx, network, addr)
			if err != nil {
				return "", began, err
			}
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(patience))
			if network == "udp" {
				if _, err := io.WriteString(c, "?"); err != nil {
					return "", began, err
				}
			}
			b := make([]byte, 64)
			n, err := c.Read(b)
			return string(b[:n]), began, err
		}
	}
}

// socketLife is how many messages a WebSocket carries, and socketRate how many a second. Where one goes is decided when it is opened: they are short, or
// those that the app got while the laptop was away would stay there.
const (
	socketLife = 5
	socketRate = 5
)

// sockets has WebSockets send messages and wait for them to come back, together so many a second. A message that fails was in flight since its
// socket was opened: it is the connection that is lost.
func sockets(ctx context.Context, web string, taken bool, rate int, say func(answer)) {
	var wg sync.WaitGroup
	for range max(rate/socketRate, 1) {
		wg.Go(func() {
			var c *websocket.Conn
			var who string
			var opened time.Time
			n := 0
			every(ctx, time.Second/socketRate, func() {
				a := timed("WebSocket", taken, time.Now(), func() (string, time.Time, error) {
					if c == nil {
						d := websocket.Dialer{HandshakeTimeout: patience}
						conn, resp, err := d.DialContext(ctx, "ws://"+web+"/ws", http.Header{"X-User": {userOf(taken)}})
						if err != nil {
							return "", time.Time{}, err
						}
						_ = resp.Body.Close() // it has none
						c, who, opened, n = conn, resp.Header.Get("X-Name"), time.Now(), 0
					}
					_ = c.SetReadDeadline(time.Now().Add(patience))
					return who, opened, back(c, websocket.TextMessage, fmt.Append(nil, "message ", n))
				})
				if n++; c != nil && (a.Err != "" || n == socketLife) {
					_ = c.Close()
					c = nil
				}
				say(a)
			})
		})
	}
	wg.Wait()
}
