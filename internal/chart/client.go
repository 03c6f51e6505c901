package chart

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"helm.sh/helm/v4/pkg/action"
	"helm.sh/helm/v4/pkg/kube"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
)

// requestTimeout bounds each request, so that a server that answers nothing is noticed.
const requestTimeout = 20 * time.Second

// client is Helm and client-go, pointed at one namespace of one cluster, for one operation.
type client struct {
	helm      *action.Configuration
	core      kubernetes.Interface
	dynamic   dynamic.Interface
	unbound   kubernetes.Interface // outlives the operation's context, for explanations
	namespace string
	flags     []string // what the caller sets, for whoever runs the command in the caller's place
	last      *lastError
	log       *slog.Logger
}

// newClient returns a client all of whose requests end with ctx; Helm itself knows no context for most of what it does.
func newClient(ctx context.Context, cfg *rest.Config, namespace string, log *slog.Logger) (*client, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	c := rest.CopyConfig(cfg)
	c.QPS, c.Burst = 50, 100 // an install is some thirty objects at once; the default of 5 a second makes it crawl
	c.WarningHandler = rest.NoWarnings{}
	if c.Timeout == 0 {
		c.Timeout = requestTimeout
	}
	unbound, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	c.Wrap(func(rt http.RoundTripper) http.RoundTripper { return &boundTransport{ctx: ctx, next: rt} })

	core, err := kubernetes.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	dyn, err := dynamic.NewForConfig(c)
	if err != nil {
		return nil, fmt.Errorf("kubernetes client: %w", err)
	}
	// The name under which plain Helm applies objects: a release of ours can then be upgraded with helm, and the other way round.
	kube.ManagedFieldsManager = "helm"
	last := &lastError{next: log.Handler()}
	helm := action.NewConfiguration(action.ConfigurationSetLogger(last))
	if err := helm.Init(&getter{cfg: c, namespace: namespace}, namespace, "secret"); err != nil {
		return nil, fmt.Errorf("set up helm: %w", err)
	}
	return &client{helm: helm, core: core, dynamic: dyn, unbound: unbound, namespace: namespace, last: last, log: log}, nil
}

// getter gives Helm what it would read from a kubeconfig.
type getter struct {
	cfg       *rest.Config
	namespace string

	mu sync.Mutex
	// guarded by mu
	disco discovery.CachedDiscoveryInterface
}

func (g *getter) ToRESTConfig() (*rest.Config, error) { return rest.CopyConfig(g.cfg), nil }

func (g *getter) ToDiscoveryClient() (discovery.CachedDiscoveryInterface, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.disco == nil {
		d, err := discovery.NewDiscoveryClientForConfig(g.cfg)
		if err != nil {
			return nil, err
		}
		g.disco = memory.NewMemCacheClient(d)
	}
	return g.disco, nil
}

func (g *getter) ToRESTMapper() (meta.RESTMapper, error) {
	d, err := g.ToDiscoveryClient()
	if err != nil {
		return nil, err
	}
	return restmapper.NewShortcutExpander(restmapper.NewDeferredDiscoveryRESTMapper(d), d, nil), nil
}

// ToRawKubeConfigLoader answers for the namespace only; nothing else of it is asked for.
func (g *getter) ToRawKubeConfigLoader() clientcmd.ClientConfig {
	return clientcmd.NewDefaultClientConfig(clientcmdapi.Config{}, &clientcmd.ConfigOverrides{
		Context: clientcmdapi.Context{Namespace: g.namespace},
	})
}

// boundTransport ends each request, until its body is closed, with ctx.
type boundTransport struct {
	ctx  context.Context
	next http.RoundTripper
}

func (t *boundTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if err := t.ctx.Err(); err != nil {
		return nil, context.Cause(t.ctx)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	stop := context.AfterFunc(t.ctx, func() { cancel(context.Cause(t.ctx)) })
	resp, err := t.next.RoundTrip(req.WithContext(ctx))
	if err != nil {
		stop()
		cancel(nil)
		return nil, err
	}
	resp.Body = &boundBody{ReadCloser: resp.Body, done: func() { stop(); cancel(nil) }}
	return resp, nil
}

type boundBody struct {
	io.ReadCloser
	done func()
}

func (b *boundBody) Close() error {
	err := b.ReadCloser.Close()
	b.done()
	return err
}

// lastError is a log handler that remembers the last record that carried an error: some of Helm's actions log the cause and return less.
type lastError struct {
	next slog.Handler

	mu sync.Mutex
	// guarded by mu
	text string
}

func (h *lastError) Enabled(context.Context, slog.Level) bool { return true }

func (h *lastError) Handle(ctx context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "error" {
			h.mu.Lock()
			h.text = a.Value.String()
			h.mu.Unlock()
		}
		return true
	})
	if !h.next.Enabled(ctx, r.Level) {
		return nil
	}
	return h.next.Handle(ctx, r)
}

func (h *lastError) WithAttrs([]slog.Attr) slog.Handler { return h }
func (h *lastError) WithGroup(string) slog.Handler      { return h }

func (h *lastError) last() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.text
}
