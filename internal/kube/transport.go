package kube

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/spdystream"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/portforward"
	clientforward "k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/transport/websocket"
	"k8s.io/streaming/pkg/httpstream"

	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Transport is a way to the traffic-manager.
type Transport string

// The transports. A port-forward goes through the pod's kubelet instead of the pod network; Direct, which few clusters have, past the API
// server.
const (
	Direct           Transport = "direct"
	ServiceProxy     Transport = "service proxy"
	WebSocketForward Transport = "WebSocket port-forward"
	SPDYForward      Transport = "SPDY port-forward"
)

// Transports are those through the API server, the better first: a port-forward carries half as much.
var Transports = []Transport{ServiceProxy, WebSocketForward, SPDYForward}

// managerPort is where the manager's pod serves /attach: the containerPort "api" of the chart.
const managerPort = 10250

// directTimeout bounds the TCP connection to each of a manager's direct addresses: where a firewall is in between, nothing answers.
const directTimeout = 2 * time.Second

// DirectConn is a connection past the API server.
type DirectConn struct {
	net.Conn
	Host string        // as it was asked for
	Trip time.Duration // how long TCP took to connect: a round trip
}

// NetConn is the connection itself.
func (c *DirectConn) NetConn() net.Conn { return c.Conn }

// DialDirect connects to the first of a manager's direct addresses that answers.
func DialDirect(ctx context.Context, addresses []string) (net.Conn, error) {
	var errs []error
	for _, a := range addresses {
		host, _, err := net.SplitHostPort(a)
		if err != nil {
			return nil, uerr.Wrap(err, uerr.Cluster, "an administrator corrects the chart's value direct.addresses", "address of the traffic-manager")
		}
		began := time.Now()
		d := net.Dialer{Timeout: directTimeout, KeepAlive: 30 * time.Second}
		c, err := d.DialContext(ctx, "tcp", a)
		if err == nil {
			return &DirectConn{Conn: c, Host: host, Trip: time.Since(began)}, nil
		}
		errs = append(errs, err)
	}
	return nil, uerr.Wrap(errors.Join(errs...), uerr.Cluster, "", "the traffic-manager is not reached at %s", strings.Join(addresses, ", "))
}

// attachTimeout bounds one Attach. An API server tries for half a minute to reach a pod that it cannot reach.
const attachTimeout = 4 * time.Second

// Attach opens a connection to the traffic-manager, in which a tunnel's handshake can begin (D1). Obstructed judges its errors.
func (c *Cluster) Attach(ctx context.Context, ns string, t Transport) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, attachTimeout)
	defer cancel()
	if t == ServiceProxy {
		var socket *tunnel.Socket
		rt, err := c.attachTransport(func(s *tunnel.Socket) { socket = s })
		if err != nil {
			return nil, err
		}
		conn, err := tunnel.Upgrade(ctx, rt, fmt.Sprintf("%s/api/v1/namespaces/%s/services/http:%s:api/proxy/attach", strings.TrimSuffix(c.Server, "/"), ns, managerName))
		if err != nil {
			return nil, c.explainAttach(err, ns)
		}
		return socket.Over(conn), nil
	}
	m, err := c.Manager(ctx, ns) // now: a manager's pod does not live as long as a session
	if err != nil {
		return nil, err
	}
	if m.Pod == "" {
		return nil, uerr.New(uerr.Cluster, "upgrade the manager with: doppel helm upgrade"+ManagerFlag(ns), "the traffic-manager does not say which pod it is")
	}
	conn, err := c.forward(ctx, ns, m.Pod, t)
	return conn, c.explainForward(err, ns)
}

func (c *Cluster) explainAttach(err error, ns string) error {
	var ue *tunnel.UpgradeError
	switch {
	case errors.As(err, &ue):
		ue.Body = statusMessage(ue.Body)
		return explainUpgrade(ue, ns)
	case errors.Is(err, context.DeadlineExceeded) && Obstructed(err): // connected, and then no answer
		return uerr.Wrap(err, uerr.Cluster, fmt.Sprintf("can the API server reach port %d of the pods in namespace %s? (firewalls of private clusters)", managerPort, ns), "the API server does not get through to the traffic-manager")
	}
	return c.explain(err, "reach the traffic-manager")
}

func (c *Cluster) explainForward(err error, ns string) error {
	var ue *tunnel.UpgradeError
	var fe *httpstream.UpgradeFailureError
	denied := false
	switch {
	case errors.As(err, &ue):
		ue.Body = statusMessage(ue.Body)
		denied = ue.Status == http.StatusForbidden || ue.Status == http.StatusUnauthorized
	case errors.As(err, &fe):
		denied = apierrors.IsForbidden(fe.Cause) || apierrors.IsUnauthorized(fe.Cause)
		err = fe.Cause
	default:
		return c.explain(err, "reach the traffic-manager")
	}
	if denied {
		return uerr.Wrap(err, uerr.Denied, fmt.Sprintf("you need the rights to get and create pods/portforward in namespace %s (chart value clientRbac.portForward)", ns), "the API server does not let you forward ports")
	}
	return uerr.Wrap(err, uerr.Cluster, "", "reach the traffic-manager")
}

// statusMessage is the message of a Kubernetes Status, or the text as it is if it is none.
func statusMessage(body string) string {
	var st metav1.Status
	if json.Unmarshal([]byte(body), &st) == nil && st.Message != "" {
		return st.Message
	}
	return body
}

// Obstructed says whether err, of Attach or of a handshake on a connection of Attach, may be the transport's fault, so that another
// transport may do better. Who lacks a right, what does not run, another key than the pinned one and an API server that cannot be
// reached are no faults of the transport.
func Obstructed(err error) bool {
	var ue *tunnel.UpgradeError
	var strange tls.RecordHeaderError
	var op *net.OpError
	switch {
	case errors.As(err, &ue):
		return obstructed(ue)
	case errors.As(err, &op) && op.Op == "dial":
		return false
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return true // something on the way ended a connection whose protocol it does not like
	case errors.As(err, &strange), errors.Is(err, context.DeadlineExceeded):
		return true
	}
	return false
}

func obstructed(e *tunnel.UpgradeError) bool {
	switch e.Status {
	case http.StatusForbidden, http.StatusUnauthorized, http.StatusNotFound:
		return false
	case http.StatusServiceUnavailable:
		return !strings.Contains(e.Body, "no endpoints available") // no pod is ready
	case http.StatusInternalServerError:
		return !strings.Contains(e.Body, "connection refused") // the API server got there, and nobody listens
	}
	return true
}

// forward opens the port of a pod, as kubectl port-forward does, and asks there for the tunnel.
func (c *Cluster) forward(ctx context.Context, ns, pod string, t Transport) (net.Conn, error) {
	u, err := url.Parse(fmt.Sprintf("%s/api/v1/namespaces/%s/pods/%s/portforward", strings.TrimSuffix(c.Server, "/"), ns, pod))
	if err != nil {
		return nil, err
	}
	dial := c.forwardSPDY
	if t == WebSocketForward {
		dial = c.forwardWebSocket
	}
	raw, err := dial(ctx, u)
	if err != nil {
		return nil, err
	}
	port, err := openPort(raw, managerPort)
	if err != nil {
		_ = raw.Close()
		return nil, fmt.Errorf("forward port %d of pod %s: %w", managerPort, pod, err)
	}
	rt := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) { return port, nil }}
	conn, err := tunnel.Upgrade(ctx, rt, "http://"+managerName+"/attach")
	if err != nil {
		if f := port.failure(); f != nil {
			err = f
		}
		_ = port.Close()
		return nil, fmt.Errorf("forward port %d of pod %s: %w", managerPort, pod, err)
	}
	return conn, nil
}

// forwardSPDY has the API server switch to SPDY.
func (c *Cluster) forwardSPDY(ctx context.Context, u *url.URL) (net.Conn, error) {
	rt, err := c.attachTransport(func(*tunnel.Socket) {})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodPost, u.String(), nil) //nolint:noctx // UpgradeTo sets it
	if err != nil {
		return nil, err
	}
	req.Header.Set(httpstream.HeaderProtocolVersion, portforward.PortForwardV1Name)
	return tunnel.UpgradeTo(ctx, rt, req, "SPDY/3.1")
}

// forwardWebSocket is the same inside a WebSocket (KEP-4006).
func (c *Cluster) forwardWebSocket(ctx context.Context, u *url.URL) (net.Conn, error) {
	rt, holder, err := websocket.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return nil, err
	}
	conn, err := websocket.Negotiate(rt, holder, req, portforward.WebsocketsSPDYTunnelingPortForwardV1)
	if err != nil {
		return nil, err
	}
	return clientforward.NewTunnelingConnection("doppel", conn), nil
}

// portConn is the data stream of a forwarded port. Only Close interrupts a Read or Write.
type portConn struct {
	*spdystream.Stream
	raw  net.Conn
	said chan error // what the kubelet says about the port, once
}

// openPort opens a stream for the kubelet's errors, then one for data (k8s.io/client-go/tools/portforward). It does not wait for
// answers: a port that cannot be opened shows when it is used.
func openPort(raw net.Conn, port int) (*portConn, error) {
	conn, err := spdystream.NewConnection(raw, false)
	if err != nil {
		return nil, err
	}
	go conn.Serve(spdystream.NoOpStreamHandler) // ends with raw
	open := func(kind string) (*spdystream.Stream, error) {
		return conn.CreateStream(http.Header{
			corev1.StreamType: {kind}, corev1.PortHeader: {strconv.Itoa(port)}, corev1.PortForwardRequestIDHeader: {"0"},
		}, nil, false)
	}
	failures, err := open(corev1.StreamTypeError)
	if err != nil {
		return nil, err
	}
	data, err := open(corev1.StreamTypeData)
	if err != nil {
		return nil, err
	}
	p := &portConn{Stream: data, raw: raw, said: make(chan error, 1)}
	go func() {
		b, err := io.ReadAll(io.LimitReader(failures, maxFailure))
		if len(b) > 0 {
			err = errors.New(strings.TrimSpace(string(b)))
		}
		p.said <- err
	}()
	return p, nil
}

// maxFailure is how much the kubelet may say about a port, in bytes; it comes on a stream of its own, failureDelay later at most.
const (
	maxFailure   = 1024
	failureDelay = 200 * time.Millisecond
)

// failure is what the kubelet has said about the port, or nil.
func (p *portConn) failure() error {
	select {
	case err := <-p.said:
		return err
	case <-time.After(failureDelay):
		return nil
	}
}

// Close ends the whole forward; closing the stream alone would leave its connection.
func (p *portConn) Close() error { return p.raw.Close() }
