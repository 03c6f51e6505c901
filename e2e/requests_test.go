package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// requests is a service in the cluster whose requests of one user go to a laptop. The servers are called app and lou: names of one length, so that
// answers differ in nothing else.
type requests struct {
	t    *testing.T // whose end is the local process's
	c    *cluster
	l    *laptop
	bin  string
	dial dialFunc

	web, grpc string // addresses of the service
	app       string // of the app's own port, which no agent is in front of
	stop      func() // ends the local process
}

// TestRequests intercepts a service by request and asks it in all the protocols that are split by request, from a node of the cluster: what a
// user's header marks is answered by the laptop, everything else by the app, as the app would without us.
func TestRequests(t *testing.T) {
	r := newRequests(t)
	t.Run("HTTP1", r.http1)
	t.Run("Odd", r.odd)
	t.Run("HTTP2", r.http2)
	t.Run("GRPC", r.gRPC)
	t.Run("Grpcurl", r.grpcurl)
	t.Run("WebSocket", r.webSocket)
	t.Run("Events", r.events)
	t.Run("LongPoll", r.longPoll)
	t.Run("Killed", r.killed)
	t.Run("Left", r.left)
	t.Run("Begun", r.begun)
	t.Run("Browser", r.browser)
}

func newRequests(t *testing.T) *requests {
	c := theCluster(t)
	ns := c.namespace(t, "requests")
	r := &requests{t: t, c: c, bin: c.probe(t), dial: c.dialer(t)}
	labels := map[string]string{"app": "web"}
	r.l = newLaptop(t, "louise")
	r.l.withManager(t)
	c.workload(t, ns, taken{
		name: "web", kind: "Deployment", run: []string{"web", "app", ":7000", ":7001"},
		ports: []corev1.ContainerPort{{Name: "http", ContainerPort: 7000}, {Name: "grpc", ContainerPort: 7001}},
		service: &corev1.ServiceSpec{Ports: []corev1.ServicePort{
			{Name: "http", Port: 80, TargetPort: intstr.FromString("http")}, {Name: "grpc", Port: 81, TargetPort: intstr.FromString("grpc")},
		}, Selector: labels},
	})
	r.start(t)
	r.l.run(t, "doppel", "connect", "-n", ns)
	r.intercept(t)
	r.web = c.clusterIP(t, ns, "web")
	r.grpc = strings.TrimSuffix(r.web, "80") + "81"
	pods, err := c.core.CoreV1().Pods(ns).List(t.Context(), metav1.ListOptions{LabelSelector: "app=web"})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			r.app = p.Status.PodIP + ":7000"
		}
	}
	return r
}

// intercept takes the requests of user lou.
func (r *requests) intercept(t *testing.T) {
	t.Helper()
	want(t, r.l.run(t, "doppel", "intercept", "web", "-p", "3000:http", "--http-match=x-user=lou"), "ACTIVE")
	want(t, r.l.run(t, "doppel", "intercept", "rpc", "-w", "web", "-p", "3001:grpc", "--http-header=x-user=lou"), "ACTIVE")
}

// start runs the local process.
func (r *requests) start(t *testing.T) {
	t.Helper()
	r.stop = r.l.start(r.t, r.bin, "web", "lou", "127.0.0.1:3000", "127.0.0.1:3001")
	eventually(t, 5*time.Second, func() error {
		if r := r.l.try(t, "curl", "-sf", "-m", "1", "127.0.0.1:3000/"); r.code != 0 {
			return fmt.Errorf("local process: %v", r)
		}
		return nil
	})
}

// other is a user whose requests are the app's, with a name as long as the one whose are not.
const other = "may"

// nameOf is who answers a user.
func nameOf(user string) string {
	if user == "lou" {
		return user
	}
	return "app"
}

// wire is a connection on which a test speaks for itself.
type wire struct {
	t *testing.T
	net.Conn
	r   *bufio.Reader
	raw bytes.Buffer // what r has read
}

func (r *requests) connect(t *testing.T, addr string) *wire {
	t.Helper()
	c, err := r.dial(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	w := &wire{t: t, Conn: c}
	w.r = bufio.NewReader(io.TeeReader(c, &w.raw))
	return w
}

func (w *wire) send(s string) {
	w.t.Helper()
	if _, err := io.WriteString(w.Conn, s); err != nil {
		w.t.Fatal(err)
	}
}

// answer reads a response whole and returns its bytes, with those of the provisional ones before it.
func (w *wire) answer(name, method string) string {
	w.t.Helper()
	w.raw.Next(w.raw.Len() - w.r.Buffered())
	for {
		resp, err := http.ReadResponse(w.r, &http.Request{Method: method})
		if err != nil {
			w.t.Fatalf("%s: %v after %.200q", name, err, w.raw.String())
		}
		_, err = io.Copy(io.Discard, resp.Body)
		_ = resp.Body.Close()
		if err != nil {
			w.t.Fatalf("%s: %v after %.200q", name, err, w.raw.String())
		}
		if resp.StatusCode >= 200 {
			return timeless(string(w.raw.Bytes()[:w.raw.Len()-w.r.Buffered()]))
		}
	}
}

// exactly reads as many bytes as s has.
func (w *wire) exactly(s string) string {
	w.t.Helper()
	b := make([]byte, len(s))
	n, err := io.ReadFull(w.r, b)
	if err != nil {
		w.t.Errorf("%v after %d bytes of %d", err, n, len(b))
	}
	return timeless(string(b[:n]))
}

var date = regexp.MustCompile(`Date: [^\r]{29}\r\n`)

func timeless(s string) string {
	return date.ReplaceAllString(s, "Date: Thu, 01 Jan 1970 00:00:00 GMT\r\n")
}

// http1Rows are requests of user %s.
var http1Rows = []struct{ name, method, raw string }{
	{"get", "GET", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"head", "HEAD", "HEAD /bytes?n=1000 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"get behind head", "GET", "GET /bytes?n=1000 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"no content", "GET", "GET /status/204 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"not modified", "GET", "GET /status/304 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nIf-None-Match: \"x\"\r\n\r\n"},
	{"early hints", "GET", "GET /early HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"length", "POST", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 5\r\n\r\nhello"},
	{"long", "PUT", "PUT / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 300000\r\n\r\n" + strings.Repeat("body of 20 letters.\n", 15000)},
	{"a request as body", "POST", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 44\r\n\r\nGET / HTTP/1.1\r\nHost: h\r\nX-User: lou\r\n\r\n...."},
	{"chunked, trailers", "POST", "POST / HTTP/1.1\r\nHost: h\r\nx-user:\t%s \r\nTransfer-Encoding: chunked\r\nTrailer: X-Sent\r\n\r\n5;ext=\"a\"\r\nhello\r\n0006\r\n world\r\n0\r\nX-Sent: at last\r\n\r\n"},
	{"continue", "POST", "POST / HTTP/1.1\r\nHost: h\r\nX-USER: %s\r\nExpect: 100-continue\r\nContent-Length: 5\r\n\r\nhello"},
	{"continue, chunked", "POST", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nExpect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n"},
	{"absolute target", "GET", "GET http://h/bytes?n=3 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"large head", "GET", "GET / HTTP/1.1\r\nHost: h\r\nCookie: " + strings.Repeat("c", 60<<10) + "\r\nX-User: %s\r\n\r\n"},
	{"bulk", "GET", "GET /bytes?n=700000 HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"options", "OPTIONS", "OPTIONS * HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
}

// http1 sends requests of two users, and of nobody, over one connection: in turn and all at once. The answers are those that the app gives where there is
// no agent, byte for byte, with the name of whom they came from.
func (r *requests) http1(t *testing.T) {
	users := []string{other, "lou", ""}
	send, expect := map[string]string{}, map[string]string{}
	direct := r.connect(t, r.app)
	for _, row := range http1Rows {
		raw := fmt.Sprintf(row.raw, other)
		direct.send(raw)
		answer := direct.answer(row.name, row.method)
		for _, u := range users {
			send[row.name+u] = fmt.Sprintf(row.raw, u)
			expect[row.name+u] = strings.ReplaceAll(answer, "X-Name: app", "X-Name: "+nameOf(u))
		}
	}
	check := func(t *testing.T, w *wire, name string) {
		t.Helper()
		if got := w.exactly(expect[name]); got != expect[name] {
			t.Fatalf("%s: got %.300q\nwant %.300q", name, got, expect[name])
		}
	}
	t.Run("in turn", func(t *testing.T) {
		w := r.connect(t, r.web)
		for _, row := range http1Rows {
			for _, u := range users {
				head, body, _ := strings.Cut(send[row.name+u], "\r\n\r\n")
				if strings.Contains(head, "Expect:") {
					w.send(head + "\r\n\r\n")
					if got := w.exactly("HTTP/1.1 100 Continue\r\n\r\n"); got != "HTTP/1.1 100 Continue\r\n\r\n" {
						t.Fatalf("%s: %q", row.name, got)
					}
					w.send(body)
					rest := strings.TrimPrefix(expect[row.name+u], "HTTP/1.1 100 Continue\r\n\r\n")
					if got := w.exactly(rest); got != rest {
						t.Fatalf("%s: got %.300q\nwant %.300q", row.name, got, rest)
					}
					continue
				}
				w.send(send[row.name+u])
				check(t, w, row.name+u)
			}
		}
	})
	t.Run("pipelined", func(t *testing.T) {
		w := r.connect(t, r.web)
		go func() {
			for range 3 {
				for _, row := range http1Rows {
					for _, u := range users {
						if _, err := io.WriteString(w.Conn, send[row.name+u]); err != nil {
							return // the reader tells
						}
					}
				}
			}
		}()
		for range 3 {
			for _, row := range http1Rows {
				for _, u := range users {
					check(t, w, row.name+u)
				}
			}
		}
	})
}

// oddRows are requests that end their connection, or might: those that two readers may understand differently, and those of HTTP/1.0. All of the
// connection goes to "to" if the user is lou, and to the app if not.
var oddRows = []struct{ name, to, raw string }{
	{"1.0", "lou", "GET /bytes?n=5 HTTP/1.0\r\nX-User: %s\r\n\r\n"},
	{"1.0, kept", "lou", "GET /bytes?n=5 HTTP/1.0\r\nX-User: %s\r\nConnection: keep-alive\r\n\r\nGET /bytes?n=6 HTTP/1.0\r\nX-User: %[1]s\r\n\r\n"},
	{"1.0 with a body", "lou", "POST / HTTP/1.0\r\nX-User: %s\r\nContent-Length: 5\r\n\r\nhello"},
	{"1.0 chunked", "app", "POST / HTTP/1.0\r\nX-User: %s\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"},
	{"close", "lou", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nConnection: close\r\n\r\n"},
	{"no host", "lou", "GET / HTTP/1.1\r\nX-User: %s\r\n\r\n"},
	{"an empty line before", "lou", "\r\nGET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n\r\n"},
	{"two hosts", "app", "GET / HTTP/1.1\r\nHost: h\r\nHost: g\r\nX-User: %s\r\n\r\n"},
	{"two lengths", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello" + last},
	{"one length twice", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 5\r\nContent-Length: 5\r\n\r\nhello" + last},
	{"length and coding", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + last},
	{"coding and length", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n" + last},
	{"unknown coding", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nTransfer-Encoding: xchunked\r\n\r\n0\r\n\r\n" + last},
	{"two codings", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n" + last},
	{"folded", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nX: 1\r\n Content-Length: 5\r\n\r\n" + last},
	{"blank before colon", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nX : 1\r\n\r\n" + last},
	{"signed length", "app", "POST / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nContent-Length: +5\r\n\r\nhello" + last},
	{"line feeds", "app", "GET / HTTP/1.1\nHost: h\nX-User: %s\n\n" + last},
	{"control character", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nX: \x01\r\n\r\n" + last},
	{"beyond the limit", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nCookie: " + strings.Repeat("c", 70<<10) + "\r\n\r\n" + last},
	{"beyond the app's limit", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\nCookie: " + strings.Repeat("c", 2<<20) + "\r\n\r\n"},
	{"no HTTP", "app", "hello\r\n"},
	{"broken off", "app", "GET / HTTP/1.1\r\nHost: h\r\nX-User: %s\r\n"},
}

// last is a request of lou's, which a reader that is led astray takes for another's or does not see, and which ends the connection.
const last = "GET /bytes?n=9 HTTP/1.1\r\nHost: h\r\nX-User: lou\r\nConnection: close\r\n\r\n"

func (r *requests) odd(t *testing.T) {
	// all sends bytes and returns all that comes back.
	all := func(t *testing.T, addr, raw string) string {
		w := r.connect(t, addr)
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			_, _ = io.WriteString(w.Conn, raw) // it may be refused in the middle
			_ = w.Conn.(*net.TCPConn).CloseWrite()
		}()
		b, err := io.ReadAll(w.r)
		if err != nil && !errors.Is(err, syscall.ECONNRESET) { // a server that has not read all may end so
			t.Errorf("%v after %.300q", err, b)
		}
		<-sent
		return timeless(string(b))
	}
	for _, row := range oddRows {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			for _, u := range []string{other, "lou"} {
				raw, to := row.raw, "app"
				if strings.Contains(raw, "%s") {
					raw = fmt.Sprintf(raw, u)
				}
				if u == "lou" {
					to = row.to
				}
				direct := all(t, r.app, raw)
				expect := strings.ReplaceAll(direct, "X-Name: app", "X-Name: "+to)
				if got := all(t, r.web, raw); got != expect {
					t.Errorf("user %s: got %.500q\nwant %.500q", u, got, expect)
				}
			}
		})
	}
}
