package manager

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/doppel-dev/doppel/api/v1alpha1"
	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/control"
	"github.com/doppel-dev/doppel/internal/mux"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/roots"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/wire"
)

// Pauses between attempts to join the relay, and how often it is told what has changed besides events.
const (
	relayFirstPause = 500 * time.Millisecond
	relayLastPause  = 30 * time.Second
	relayEager      = time.Minute      // since it was lost: pauses do not grow, as a relay that restarts is back soon
	relayJoin       = 15 * time.Second // one attempt
	relayPoll       = time.Second
	relayKeepAlive  = 10 * time.Second
	ingressTLS      = 5 * time.Second // the handshake with an ingress
)

// Files of the Secret that the relay's administrator has given: the cluster's token and, where its certificate is of an authority that nobody
// knows, that authority's.
const (
	relayTokenFile = "token"
	relayCAFile    = "ca.crt"
)

// relayLink keeps this cluster joined to the relay: it dials out, so that nothing of the cluster listens for it.
type relayLink struct {
	m   *Manager
	url *url.URL
	dir string // of the Secret's files, read at each attempt: a new token needs no restart
	log *slog.Logger

	mu sync.Mutex
	// guarded by mu
	cluster string // what the relay knows this cluster as
	problem string // why it is not joined; "": it is
	flows   map[net.Conn]previewFlow
}

// previewFlow is a connection that the relay has opened.
type previewFlow struct {
	id      string
	ingress v1alpha1.Ingress
}

// newRelayLink returns nil where no relay is configured.
func newRelayLink(m *Manager) (*relayLink, error) {
	if m.cfg.RelayURL == "" {
		return nil, nil
	}
	u, err := url.Parse(m.cfg.RelayURL)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("relay URL %q: want https://DOMAIN", m.cfg.RelayURL)
	}
	l := &relayLink{m: m, url: u, dir: m.cfg.RelaySecret, log: m.cfg.Log, problem: "it has not been reached yet", flows: map[net.Conn]previewFlow{}}
	m.engaged.onChange(func(engagement) { l.endStale() })
	return l, nil
}

// state is what laptops are told.
func (l *relayLink) state() *control.Relay {
	if l == nil {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	return &control.Relay{URL: strings.TrimSuffix(l.url.String(), "/"), Cluster: l.cluster, Problem: l.problem}
}

func (l *relayLink) set(cluster, problem string) {
	l.mu.Lock()
	changed := l.cluster != cluster || l.problem != problem
	l.cluster, l.problem = cluster, problem
	l.mu.Unlock()
	if changed {
		l.m.notifyIntercepts()
	}
}

// run joins the relay again and again until ctx ends.
func (l *relayLink) run(ctx context.Context) error {
	roots.Ensure() // the relay's may be of anybody
	pause, lost := relayFirstPause, time.Time{}
	for {
		joined, err := l.join(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if joined {
			pause, lost = relayFirstPause, time.Now()
		}
		l.log.Warn("not joined to the relay", "url", l.url.String(), "err", err, "retry_in", pause)
		l.set("", err.Error())
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause/2 + rand.N(pause)): // not all clusters at once after a restart of the relay
		}
		if time.Since(lost) > relayEager {
			pause = min(2*pause, relayLastPause)
		}
	}
}

// join is one life of the link; joined says that it came about.
func (l *relayLink) join(ctx context.Context) (joined bool, err error) {
	jctx, cancel := context.WithTimeout(ctx, relayJoin)
	conn, err := l.upgrade(jctx)
	cancel()
	if err != nil {
		return false, err
	}
	s, err := mux.New(conn, mux.Config{Initiator: true, KeepAlive: relayKeepAlive, Log: l.log})
	if err != nil {
		return false, errors.Join(err, conn.Close())
	}
	return true, tunnel.Serve(ctx, s, tunnel.Handlers{Preview: l.serve, Watch: l.watch, Log: l.log})
}

func (l *relayLink) upgrade(ctx context.Context) (net.Conn, error) {
	token, err := os.ReadFile(filepath.Join(l.dir, relayTokenFile))
	if err != nil {
		return nil, fmt.Errorf("token of the relay: %w", err)
	}
	authorities, err := relayRoots(filepath.Join(l.dir, relayCAFile))
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequest(http.MethodGet, l.url.JoinPath(relayapi.LinkPath).String(), nil) //nolint:noctx // UpgradeTo sets it
	if err != nil {
		return nil, err
	}
	req.Header.Set("Authorization", "Bearer "+strings.TrimSpace(string(token)))
	rt := &http.Transport{
		Proxy: http.ProxyFromEnvironment, DisableKeepAlives: true, // of a single use
		TLSClientConfig: &tls.Config{RootCAs: authorities, NextProtos: []string{"http/1.1"}, MinVersion: tls.VersionTLS12},
	}
	return tunnel.UpgradeTo(ctx, rt, req, tunnel.UpgradeProtocol)
}

// relayRoots are the system's authorities and that of a file, if it is there.
func relayRoots(file string) (*x509.CertPool, error) {
	pem, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("authority of the relay: %w", err)
	}
	pool, err := x509.SystemCertPool()
	if err != nil {
		pool = x509.NewCertPool()
	}
	if !pool.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("authority of the relay: no certificate in %s", file)
	}
	return pool, nil
}

// watch tells the relay which previews are there, for as long as the link lives.
func (l *relayLink) watch(ctx context.Context, method string, body []byte, send func(any) error) error {
	var welcome relayapi.Welcome
	if method != relayapi.RelayPreviews {
		return fmt.Errorf("unknown watch %q", method)
	}
	if err := json.Unmarshal(body, &welcome); err != nil {
		return err
	}
	l.log.Info("joined the relay", "url", l.url.String())
	l.set(welcome.Cluster, "")
	changed := l.m.watchers.add(everybody)
	defer l.m.watchers.remove(changed)
	tick := time.NewTicker(relayPoll) // laptops come and go without an event
	defer tick.Stop()
	var last *relayapi.ClusterState
	for {
		if now := l.previews(); last == nil || !reflect.DeepEqual(now, *last) {
			if err := send(now); err != nil {
				return err
			}
			last = &now
		}
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		case <-tick.C:
		}
	}
}

func (l *relayLink) previews() relayapi.ClusterState {
	st := relayapi.ClusterState{Product: buildinfo.Version, Previews: []relayapi.LivePreview{}, Sessions: l.m.laptops.count()}
	for _, g := range l.m.engaged.where(func(g engagement) bool { return g.Preview != nil }) {
		st.Previews = append(st.Previews, relayapi.LivePreview{ID: g.Preview.ID, Laptop: l.m.laptops.tunnel(g.Session) != nil})
	}
	slices.SortFunc(st.Previews, func(a, b relayapi.LivePreview) int { return cmp.Compare(a.ID, b.ID) })
	return st
}

// serve takes a connection of the relay to the ingress of a preview. Where that is the intercept says, which its user has written with their own
// credentials, and it has to be within the reach of their session: the relay has no say in it.
func (l *relayLink) serve(r *mux.Request, h wire.PreviewHeader) {
	g, ok := l.m.engaged.preview(h.ID)
	if !ok {
		_ = r.Reject(wire.CodeNotFound, "nobody intercepts for this preview")
		return
	}
	if l.m.laptops.tunnel(g.Session) == nil {
		_ = r.Reject(wire.CodeGone, errAway.Msg)
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), dialTimeout)
	conn, proto, err := l.dial(ctx, g, h.HTTP2)
	cancel()
	if err != nil {
		code := wire.CodeOf(err)
		if errors.Is(err, errOutOfReach) {
			code = wire.CodeDenied
		}
		l.log.Debug("ingress not reached", "err", err)
		_ = r.Reject(code, err.Error())
		return
	}
	l.mu.Lock()
	l.flows[conn] = previewFlow{h.ID, g.Preview.Ingress}
	l.mu.Unlock()
	l.endStale() // if it ended meanwhile
	_ = tunnel.ServeConn(r, conn, []byte(proto))
	l.mu.Lock()
	delete(l.flows, conn)
	l.mu.Unlock()
}

// endStale ends the connections of previews that are over, or lead elsewhere now: the relay keeps connections for later requests.
func (l *relayLink) endStale() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for conn, f := range l.flows {
		if g, ok := l.m.engaged.preview(f.id); !ok || g.Preview.Ingress != f.ingress {
			_ = conn.Close()
		}
	}
}

// errOutOfReach says that the ingress is not what the preview's owner may reach.
var errOutOfReach = errors.New("the ingress is out of the reach of the session that the preview is of")

// dial connects to the ingress of a preview. The protocol is what TLS has agreed on with it, if the relay has asked for HTTP/2; without TLS there is none.
func (l *relayLink) dial(ctx context.Context, g engagement, http2 bool) (_ net.Conn, proto string, err error) {
	in := g.Preview.Ingress
	sess, err := l.m.sessionByUID(ctx, g.Session)
	if err != nil {
		return nil, "", err
	}
	if sess == nil {
		return nil, "", errAway
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", in.Host)
	if err != nil {
		return nil, "", err
	}
	err = errOutOfReach
	for _, a := range addrs {
		to := netip.AddrPortFrom(a.Unmap(), uint16(in.Port))
		if !mayDial(to) {
			continue
		}
		if ok, rerr := l.m.reachOf(sess).address(ctx, l.m.addresses, to.Addr()); rerr != nil || !ok {
			err = errors.Join(err, rerr)
			continue
		}
		var c net.Conn
		if c, err = new(net.Dialer).DialContext(ctx, "tcp", to.String()); err != nil {
			continue
		}
		if !in.TLS {
			return c, "", nil
		}
		return l.secure(ctx, c, in, http2)
	}
	return nil, "", err
}

// secure speaks TLS with an ingress. Its certificate is not verified: inside a cluster it is rarely one for a name that we could know, and whoever
// answers at the address of a service is whom its user has named.
func (l *relayLink) secure(ctx context.Context, c net.Conn, in v1alpha1.Ingress, http2 bool) (_ net.Conn, proto string, err error) {
	name := in.Host
	if in.L5Host != "" {
		name = in.L5Host
	}
	if h, port, err := net.SplitHostPort(name); err == nil {
		if _, err := strconv.Atoi(port); err == nil {
			name = h
		}
	}
	protos := []string{"http/1.1"}
	if http2 {
		protos = []string{"h2", "http/1.1"}
	}
	t := tls.Client(c, &tls.Config{ServerName: name, InsecureSkipVerify: true, NextProtos: protos}) //nolint:gosec // see above
	ctx, cancel := context.WithTimeout(ctx, ingressTLS)
	defer cancel()
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, "", errors.Join(err, c.Close())
	}
	if http2 {
		proto = cmp.Or(t.ConnectionState().NegotiatedProtocol, "http/1.1") // who does not know ALPN speaks that
	}
	return secured{t, c}, proto, nil
}

// secured is a TLS connection as a flow.
type secured struct {
	*tls.Conn
	raw net.Conn
}

// Reset ends the connection at once.
func (s secured) Reset() {
	if t, ok := s.raw.(*net.TCPConn); ok {
		_ = t.SetLinger(0)
	}
	_ = s.raw.Close()
}
