package kube

import (
	"bufio"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"

	gwebsocket "github.com/gorilla/websocket"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/util/portforward"
	clientforward "k8s.io/client-go/tools/portforward"
	"k8s.io/streaming/pkg/httpstream"
	"k8s.io/streaming/pkg/httpstream/spdy"

	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

const forwardPath = "/api/v1/namespaces/doppel/pods/traffic-manager-7/portforward"

// kubelet forwards ports to a manager that echoes, or says why it does not.
type kubelet struct{ refusal string }

func (k kubelet) spdy(w http.ResponseWriter, r *http.Request) {
	if _, err := httpstream.Handshake(r, w, []string{portforward.PortForwardV1Name}); err != nil {
		return
	}
	if conn := spdy.NewResponseUpgrader().UpgradeResponse(w, r, k.stream()); conn != nil {
		<-conn.CloseChan()
	}
}

func (k kubelet) webSocket(w http.ResponseWriter, r *http.Request) {
	up := gwebsocket.Upgrader{Subprotocols: []string{portforward.WebsocketsSPDYTunnelingPortForwardV1}}
	ws, err := up.Upgrade(w, r, nil)
	if err != nil {
		return
	}
	conn, err := spdy.NewServerConnection(clientforward.NewTunnelingConnection("test", ws), k.stream())
	if err != nil {
		return
	}
	<-conn.CloseChan()
	_ = ws.Close()
}

func (k kubelet) stream() httpstream.NewStreamHandler {
	failures := make(chan httpstream.Stream, 1)
	return func(s httpstream.Stream, replied <-chan struct{}) error {
		if port := s.Headers().Get(corev1.PortHeader); port != "10250" {
			return fmt.Errorf("port %q", port)
		}
		if s.Headers().Get(corev1.StreamType) == corev1.StreamTypeError {
			failures <- s
			return nil
		}
		go func() {
			<-replied
			failure := <-failures
			if k.refusal != "" {
				_, _ = io.WriteString(failure, k.refusal)
				_ = failure.Close()
				_ = s.Reset()
				return
			}
			_ = failure.Close()
			echoManager(s)
		}()
		return nil
	}
}

// echoManager is /attach on a stream.
func echoManager(s io.ReadWriter) {
	r := bufio.NewReader(s)
	req, err := http.ReadRequest(r)
	if err != nil || req.URL.Path != "/attach" || req.Header.Get("Upgrade") != tunnel.UpgradeProtocol {
		_, _ = io.WriteString(s, "HTTP/1.1 426 Upgrade Required\r\nContent-Length: 0\r\n\r\n")
		return
	}
	_, _ = fmt.Fprintf(s, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", tunnel.UpgradeProtocol)
	_, _ = io.Copy(s, r)
}

func TestForward(t *testing.T) {
	cm := &corev1.ConfigMap{Data: map[string]string{"key": "sha256:k", "protocol": "1", "pod": "traffic-manager-7"}}
	echo := func(transport Transport) func(*testing.T) {
		return func(t *testing.T) {
			s := newAPIServer(t, map[string]any{
				"GET " + configMapPath: cm, "POST " + forwardPath: http.HandlerFunc(kubelet{}.spdy), "GET " + forwardPath: http.HandlerFunc(kubelet{}.webSocket),
			})
			conn, err := s.c.Attach(t.Context(), "doppel", transport)
			if err != nil {
				t.Fatal(err)
			}
			want := strings.Repeat("a download ", 100_000)
			go func() { _, _ = io.WriteString(conn, want) }()
			got := make([]byte, len(want))
			if _, err := io.ReadFull(conn, got); err != nil || string(got) != want {
				t.Errorf("the echo is another one, %v", err)
			}
			if err := conn.Close(); err != nil {
				t.Error(err)
			}
			if _, err := conn.Read(got); err == nil {
				t.Error("read after Close")
			}
		}
	}
	t.Run("SPDY", echo(SPDYForward))
	t.Run("WebSocket", echo(WebSocketForward))

	refused := kubelet{refusal: "error forwarding port 10250 to pod: connection refused"}
	no := func(code int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "words of a proxy", code) }
	}
	for name, tt := range map[string]struct {
		transport  Transport
		answer, cm any
		kind       uerr.Kind
		msg, hint  string
	}{
		"SPDY, port refused":       {SPDYForward, http.HandlerFunc(refused.spdy), cm, uerr.Cluster, "forward port 10250 of pod traffic-manager-7: error forwarding port 10250 to pod: connection refused", ""},
		"WebSocket, port refused":  {WebSocketForward, http.HandlerFunc(refused.webSocket), cm, uerr.Cluster, "connection refused", ""},
		"SPDY, forbidden":          {SPDYForward, forbidden(), cm, uerr.Denied, "RBAC says no", "get and create pods/portforward in namespace doppel (chart value clientRbac.portForward)"},
		"WebSocket, forbidden":     {WebSocketForward, forbidden(), cm, uerr.Denied, "RBAC says no", "pods/portforward"},
		"SPDY, a proxy's no":       {SPDYForward, no(400), cm, uerr.Cluster, "HTTP 400 instead of 101 Switching Protocols: words of a proxy", ""},
		"WebSocket, a proxy's no":  {WebSocketForward, no(400), cm, uerr.Cluster, "words of a proxy", ""},
		"no pod":                   {SPDYForward, nil, cm, uerr.Cluster, "HTTP 404", ""},
		"a manager without a name": {SPDYForward, nil, &corev1.ConfigMap{Data: map[string]string{"key": "sha256:k", "protocol": "1"}}, uerr.Cluster, "does not say which pod it is", "doppel helm upgrade"},
	} {
		t.Run(name, func(t *testing.T) {
			answers := map[string]any{"GET " + configMapPath: tt.cm}
			if tt.answer != nil {
				answers[map[Transport]string{SPDYForward: "POST ", WebSocketForward: "GET "}[tt.transport]+forwardPath] = tt.answer
			}
			_, err := newAPIServer(t, answers).c.Attach(t.Context(), "doppel", tt.transport)
			wantError(t, err, tt.kind, tt.msg, tt.hint)
		})
	}
}

// Another transport is tried only where it may help.
func TestObstructed(t *testing.T) {
	for want, errs := range map[bool][]error{
		true: {
			&tunnel.UpgradeError{Status: 200},
			&tunnel.UpgradeError{Status: 400},
			&tunnel.UpgradeError{Status: 426, Body: "this is the way into a doppel tunnel"}, // a proxy took the header away
			&tunnel.UpgradeError{Status: 500, Body: "dial tcp 10.244.0.7:10250: connect: no route to host"},
			&tunnel.UpgradeError{Status: 502},
			&tunnel.UpgradeError{Status: 503, Body: "words of a proxy"},
			fmt.Errorf("TLS: %w", io.EOF),
			&net.OpError{Op: "read", Err: syscall.ECONNRESET},
			fmt.Errorf("TLS: %w", tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}),
			context.DeadlineExceeded,
		},
		false: {
			&tunnel.UpgradeError{Status: 401},
			&tunnel.UpgradeError{Status: 403},
			&tunnel.UpgradeError{Status: 404},
			&tunnel.UpgradeError{Status: 503, Body: `no endpoints available for service "http:traffic-manager:api"`},
			&tunnel.UpgradeError{Status: 500, Body: "dial tcp 10.244.0.7:10250: connect: connection refused"},
			&net.OpError{Op: "dial", Err: syscall.ECONNREFUSED},
			&net.OpError{Op: "dial", Err: context.DeadlineExceeded},
			tunnel.ErrPin,
			&mux.RejectError{},
			context.Canceled,
			apierrors.NewUnauthorized("x"),
			errors.New("anything else"),
		},
	} {
		for _, err := range errs {
			if got := Obstructed(uerr.Wrap(err, uerr.Cluster, "", "reach the traffic-manager")); got != want {
				t.Errorf("%v: %t", err, got)
			}
		}
	}
}
