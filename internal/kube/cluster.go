// Package kube owns what the laptop asks of Kubernetes, always with the user's own credentials; it is the laptop's only importer of client-go.
package kube

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	utilnet "k8s.io/apimachinery/pkg/util/net"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/doppel-dev/doppel/internal/buildinfo"
	"github.com/doppel-dev/doppel/internal/rawio"
	"github.com/doppel-dev/doppel/internal/tunnel"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// Options choose a cluster the way kubectl does.
type Options struct {
	Kubeconfig string   `json:"kubeconfig,omitempty"` // a path list as in $KUBECONFIG; empty: the default places
	Context    string   `json:"context,omitempty"`    // empty: the current context
	Namespace  string   `json:"namespace,omitempty"`  // empty: the context's namespace
	As         string   `json:"as,omitempty"`         // user to impersonate; empty: the kubeconfig's, if any
	AsGroups   []string `json:"asGroups,omitempty"`   // and groups
	Env        []string `json:"-"`                    // the environment of who asks, where that is another process; nil: it is this one
}

// Cluster is one cluster as one user sees it.
type Cluster struct {
	Context   string
	Namespace string
	Server    string

	config *rest.Config
	api    *rest.RESTClient
	raw    clientcmd.ClientConfig
	user   string // known after WhoAmI
	clock  clock

	from atomic.Pointer[netip.Addr] // this machine's address of the last connection that was to be attached
}

// requestTimeout bounds every single request, so that a slow API server is told from a dead one.
const requestTimeout = 10 * time.Second

// Load reads the kubeconfig; no request is made yet.
func Load(o Options) (*Cluster, error) {
	rules := loadingRules(o)
	over := &clientcmd.ConfigOverrides{
		CurrentContext: o.Context, Context: clientcmdapi.Context{Namespace: o.Namespace},
		AuthInfo: clientcmdapi.AuthInfo{Impersonate: o.As, ImpersonateGroups: o.AsGroups},
	}
	cc := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, over)
	raw, err := cc.RawConfig()
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "check the file that $KUBECONFIG or --kubeconfig names", "cannot read the kubeconfig")
	}
	name := o.Context
	if name == "" {
		name = raw.CurrentContext
	}
	if err := checkContext(raw, name, rules); err != nil {
		return nil, err
	}
	cfg, err := cc.ClientConfig()
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "check the kubeconfig with: kubectl config view", "context %q cannot be used", name)
	}
	ns, _, err := cc.Namespace()
	if err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "", "namespace of context %q", name)
	}
	if o.Env != nil {
		inEnvironment(cfg, o.Env)
	}
	return newCluster(cfg, cc, name, ns)
}

// Contexts are the names of the contexts in the kubeconfig.
func Contexts(o Options) []string {
	rules := loadingRules(o)
	raw, err := rules.Load()
	if err != nil {
		return nil
	}
	return slices.Sorted(maps.Keys(raw.Contexts))
}

func loadingRules(o Options) *clientcmd.ClientConfigLoadingRules {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	if o.Kubeconfig != "" {
		rules.Precedence = strings.Split(o.Kubeconfig, string(os.PathListSeparator))
		rules.WarnIfAllMissing = false
	}
	return rules
}

func checkContext(raw clientcmdapi.Config, name string, rules *clientcmd.ClientConfigLoadingRules) error {
	if len(raw.Contexts) == 0 {
		return uerr.New(uerr.Usage, "set KUBECONFIG to the file with your cluster's credentials", "no kubeconfig: none of %s has a context", strings.Join(slices.DeleteFunc(slices.Clone(rules.GetLoadingPrecedence()), func(f string) bool { return f == "" }), ", "))
	}
	if name == "" {
		return uerr.New(uerr.Usage, "choose one with --context, or with: kubectl config use-context NAME", "the kubeconfig has no current context")
	}
	if raw.Contexts[name] == nil {
		have := slices.Sorted(maps.Keys(raw.Contexts))
		return uerr.New(uerr.Usage, "it has: "+strings.Join(have, ", "), "no context %q in the kubeconfig", name)
	}
	return nil
}

func newCluster(cfg *rest.Config, cc clientcmd.ClientConfig, name, ns string) (*Cluster, error) {
	c := &Cluster{Context: name, Namespace: ns, Server: cfg.Host, config: cfg, raw: cc}
	cfg.Wrap(c.clock.wrap)
	if file := cfg.BearerTokenFile; file != "" {
		cfg.Wrap(func(rt http.RoundTripper) http.RoundTripper { return &tokenTransport{rt, file} })
	}
	cfg.UserAgent = "doppel/" + buildinfo.Version
	cfg.QPS, cfg.Burst = 50, 100
	var err error
	if c.api, err = newREST(cfg); err != nil {
		return nil, uerr.Wrap(err, uerr.Usage, "check the kubeconfig with: kubectl config view", "context %q cannot be used", name)
	}
	return c, nil
}

// RESTConfig returns a copy of the connection's configuration, and ClientConfig the kubeconfig behind it, for the Helm client.
func (c *Cluster) RESTConfig() *rest.Config { return rest.CopyConfig(c.config) }

// ClientConfig returns the kubeconfig that the cluster was loaded from.
func (c *Cluster) ClientConfig() clientcmd.ClientConfig { return c.raw }

// SameUser says whether both impersonate the same.
func (c *Cluster) SameUser(o *Cluster) bool {
	a, b := c.config.Impersonate, o.config.Impersonate
	return a.UserName == b.UserName && slices.Equal(a.Groups, b.Groups)
}

// WhoAmI asks the API server who the credentials belong to (KEP-3325). It is also the first request: it finds an API server that does not answer.
func (c *Cluster) WhoAmI(ctx context.Context) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := selfReviews.create(ctx, c, "", &authenticationv1.SelfSubjectReview{})
	if err != nil {
		return "", c.explain(err, "ask who you are")
	}
	c.user = r.Status.UserInfo.Username
	return c.user, nil
}

// DirectAddrs resolves the names of a manager's direct addresses, as far as they are known here.
func DirectAddrs(ctx context.Context, addresses []string) []netip.Addr {
	var out []netip.Addr
	for _, a := range addresses {
		host, _, _ := net.SplitHostPort(a)
		if addrs, err := lookup(ctx, host); err == nil {
			out = append(out, addrs...)
		}
	}
	return out
}

// ServerAddrs resolves the API server's name, and that of the proxy on the way if there is one; these addresses must never be
// routed into the tunnel.
func (c *Cluster) ServerAddrs(ctx context.Context) ([]netip.Addr, error) {
	u, err := url.Parse(c.Server)
	if err != nil {
		return nil, err
	}
	via, err := proxyOf(c.config)(&http.Request{URL: u})
	if err != nil {
		return nil, fmt.Errorf("proxy to the API server: %w", err)
	}
	addrs, err := lookup(ctx, u.Hostname())
	if via == nil {
		return addrs, err
	}
	more, perr := lookup(ctx, via.Hostname())
	return append(addrs, more...), perr // only the proxy has to know the API server's name
}

func lookup(ctx context.Context, host string) ([]netip.Addr, error) {
	if a, err := netip.ParseAddr(host); err == nil {
		return []netip.Addr{a.Unmap()}, nil
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", host)
	if err != nil {
		return nil, fmt.Errorf("address of the API server: %w", err)
	}
	for i := range addrs {
		addrs[i] = addrs[i].Unmap()
	}
	return addrs, nil
}

// proxyOf is the kubeconfig's proxy-url, else what $HTTPS_PROXY says, as in client-go.
func proxyOf(cfg *rest.Config) func(*http.Request) (*url.URL, error) {
	if cfg.Proxy != nil {
		return cfg.Proxy
	}
	return http.ProxyFromEnvironment
}

// explain turns an error of a request into one that a user can act on.
func (c *Cluster) explain(err error, doing string) error {
	var ne net.Error
	var ue *url.Error
	switch {
	case err == nil:
		return nil
	case errors.Is(err, context.Canceled):
		return uerr.Wrap(err, uerr.Canceled, "", "%s", doing)
	case apierrors.IsUnauthorized(err):
		return uerr.Wrap(err, uerr.Denied, "log in to the cluster again; kubectl get ns shows the same error", "%s: the API server does not accept your credentials", doing)
	case apierrors.IsForbidden(err):
		return uerr.Wrap(err, uerr.Denied, "ask an administrator of the cluster for the right", "%s", doing)
	case apierrors.IsBadRequest(err) && strings.Contains(err.Error(), "strict decoding error"):
		return uerr.Wrap(err, uerr.Conflict, "ask an administrator for: doppel helm upgrade", "%s: the doppel in the cluster is older than this one, and does not know what is wanted", doing)
	case strings.Contains(err.Error(), "getting credentials: "): // a credential plugin's failure is a url.Error too
		return uerr.Wrap(err, uerr.Denied, "log in to the cluster again; kubectl get ns shows the same error", "%s: the kubeconfig's credential plugin failed", doing)
	case errors.Is(err, context.DeadlineExceeded) || errors.As(err, &ne) && ne.Timeout():
		return uerr.Wrap(err, uerr.Cluster, "is the cluster up, is a VPN needed? Try: kubectl --context "+c.Context+" version", "%s: the API server at %s does not answer", doing, c.Server)
	case errors.As(err, &ue) || errors.As(err, &ne):
		return uerr.Wrap(err, uerr.Cluster, "is the cluster up, is a VPN needed? Try: kubectl --context "+c.Context+" version", "%s: the API server at %s cannot be reached", doing, c.Server)
	case errors.Is(err, fs.ErrNotExist):
		return uerr.Wrap(err, uerr.Usage, "check the files that the kubeconfig names", "%s", doing)
	}
	return uerr.Wrap(err, uerr.Cluster, "", "%s", doing)
}

// CloseIdle closes connections that are not in use: after a change of the network they may be dead, and the next request would
// wait for an answer in vain.
func (c *Cluster) CloseIdle() {
	if c.api.Client != nil {
		utilnet.CloseIdleConnectionsFor(c.api.Client.Transport)
	}
}

// attachDialTimeout bounds the TCP handshake with the API server: SYN and one repetition. What comes later is on a new attempt
// sooner than the third SYN, 3 s later.
const attachDialTimeout = 3 * time.Second

// attachTransport is for one attempt to attach, on a connection of its own, of which made is told. It speaks HTTP/1.1 only: over HTTP/2 the API server's
// proxy ignores Upgrade (D1).
func (c *Cluster) attachTransport(made func(*tunnel.Socket)) (http.RoundTripper, error) {
	cfg := rest.CopyConfig(c.config)
	cfg.NextProtos = []string{"http/1.1"}
	tlsConfig, err := rest.TLSConfigFor(cfg)
	if err != nil {
		return nil, err
	}
	return rest.HTTPWrappersForConfig(cfg, &http.Transport{
		Proxy:               proxyOf(cfg),
		TLSClientConfig:     tlsConfig,
		TLSHandshakeTimeout: requestTimeout,
		DisableKeepAlives:   true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			d := net.Dialer{Timeout: attachDialTimeout, KeepAlive: 30 * time.Second}
			conn, err := d.DialContext(ctx, network, address)
			if err != nil {
				return nil, err
			}
			if a, ok := conn.LocalAddr().(*net.TCPAddr); ok {
				local := a.AddrPort().Addr().Unmap().WithZone("")
				c.from.Store(&local)
			}
			s := tunnel.NewSocket(rawio.New(conn))
			made(s)
			return s, tunnel.Tune(conn)
		},
	})
}

// Stranded says whether this machine no longer has the address that it attached from: nothing comes through such a connection any more.
func (c *Cluster) Stranded() bool {
	from := c.from.Load()
	if from == nil {
		return false
	}
	addrs, err := net.InterfaceAddrs()
	return err == nil && !slices.ContainsFunc(addrs, func(a net.Addr) bool {
		n, ok := a.(*net.IPNet)
		return ok && n.IP.Equal(from.AsSlice())
	})
}
