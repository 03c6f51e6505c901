// Package preview owns what answers on a preview's domain: who may come in, the way to the cluster, and the list of visitors.
package preview

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/net/http/httpguts"

	"github.com/doppel-dev/doppel/internal/relay/access"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// Names of the cookies on a preview's host. The prefix __Host- keeps other hosts of the domain from setting them (RFC 6265bis, section 4.1.3.2).
const (
	visitCookie = "__Host-doppel-visit"
	stateCookie = "__Host-doppel-state"
	ourCookies  = "__Host-doppel"
)

// Paths of ours on a preview's host.
const (
	ours      = "/.doppel/"
	enterPath = "/.doppel/enter"
)

// VisitLife is how long a visit counts before the browser is asked again who it is.
const VisitLife = 12 * time.Hour

// stateLife is how long a browser may take to say who it is.
const stateLife = 10 * time.Minute

// drainLook is how often it is looked whether everything that is open has ended.
const drainLook = 10 * time.Millisecond

// dialTimeout bounds how long the cluster may take to reach its ingress.
const dialTimeout = 10 * time.Second

// Config is what a Handler needs.
type Config struct {
	Base  *url.URL // where people log in; previews are one label below it
	Store *store.Store
	// Dial opens a connection to the ingress of a preview. If HTTP/2 is asked for, it says what TLS has agreed on with the ingress: h2 or http/1.1, or
	// "" where there is no TLS.
	Dial func(ctx context.Context, cluster, preview string, http2 bool) (c net.Conn, proto string, err error)
	// Away says why a preview shows nothing now, as far as the cluster has told; nil: it has not.
	Away func(cluster, preview string) error
	// Explain says what a failure of Dial means, for people, with the status of the answer.
	Explain func(error) (status int, text string)
	Log     *slog.Logger
}

// Handler answers for all previews.
type Handler struct {
	cfg    Config
	access access.Access
	proxy  *httputil.ReverseProxy
	open   openRequests
	visits *visits
}

// New returns a handler; Watch and List do what it does beside answering.
func New(cfg Config) *Handler {
	h := &Handler{cfg: cfg, access: access.Access{Store: cfg.Store}, visits: newVisits(cfg.Store, cfg.Log)}
	h.open.all, h.open.byLabel = map[*openRequest]bool{}, map[string]int{}
	h.proxy = &httputil.ReverseProxy{
		Rewrite: rewrite, ModifyResponse: clean, ErrorHandler: h.failed,
		FlushInterval: -1, // what an app sends, its visitor sees at once
		ErrorLog:      slog.NewLogLogger(cfg.Log.Handler(), slog.LevelDebug),
		Transport:     h.newTransport(),
	}
	return h
}

// List stores visits until ctx ends, and those that are left then.
func (h *Handler) List(ctx context.Context) error {
	h.visits.run(ctx)
	return nil
}

// Drain waits until nothing is open, or ctx ends.
func (h *Handler) Drain(ctx context.Context) {
	tick := time.NewTicker(drainLook)
	defer tick.Stop()
	for h.open.count() > 0 {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Open counts the requests that are open.
func (h *Handler) Open() int { return h.open.count() }

// Unlisted counts the visits that were too many at once to be listed.
func (h *Handler) Unlisted() uint64 { return h.visits.unlisted.Load() }

// request is what is known of a request besides itself.
type request struct {
	preview  store.Preview
	visitor  access.Visitor
	grpc     bool                     // it is a call of gRPC
	deadline time.Time                // of the call; zero: it has none
	dialled  atomic.Pointer[unproven] // for it, if so
}

type requestKey struct{}

// ServeHTTP answers a request for the preview whose label the host's first one is.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	label, _, _ := strings.Cut(r.Host, ".")
	w.Header().Set("X-Robots-Tag", "noindex")
	if !isMethod(r.Method) {
		http.Error(w, "There is no such method.", http.StatusNotImplemented)
		return
	}
	if r.URL.Path == enterPath {
		h.enter(w, r, label)
		return
	}
	if strings.HasPrefix(r.URL.Path, ours) {
		http.NotFound(w, r)
		return
	}
	token := visitToken(r)
	q, err := h.admit(r.Context(), label, token) // as long as it takes: nobody waits behind it
	switch {
	case errors.Is(err, errMayNot):
		h.refuse(w, r, label)
		return
	case err != nil:
		h.cfg.Log.Error("visitor not looked up", "err", err)
		http.Error(w, "The relay has a problem of its own; try again.", http.StatusInternalServerError)
		return
	}
	ctx, leave, ok := h.open.enter(r.Context(), label, token, q)
	if !ok {
		w.Header().Set("Retry-After", "5")
		http.Error(w, "Too many requests of this preview are open.", http.StatusServiceUnavailable)
		return
	}
	defer leave()
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	defer endWith(ctx, w)()
	if q.grpc = isGRPC(r.Header); q.grpc {
		q.deadline = deadlineOf(r.Header)
	}
	v := h.visits.begin(q, r)
	rec := &recorder{ResponseWriter: w, slow: newSlow(func() { cut(errSlow) })}
	defer func() { v.end(rec.status) }() // also when the proxy gives up by a panic (http.ErrAbortHandler)
	r = r.WithContext(context.WithValue(ctx, requestKey{}, q))
	// Connections are kept, and the cluster's own version must not answer on one for a laptop that has gone.
	if err := h.cfg.Away(q.preview.Cluster, q.preview.ID); err != nil {
		h.failed(rec, r, err)
		return
	}
	h.proxy.ServeHTTP(rec, r)
}

// maxMethod bounds a method, in bytes: the longest that is registered has 17.
const maxMethod = 32

// isMethod says whether a request may have a method: HTTP/2's may be anything here (RFC 9110, section 9.1, and RFC 9112, section 3, for the answer).
func isMethod(m string) bool { return len(m) <= maxMethod && httpguts.ValidHeaderFieldName(m) } // which is a token, too

// errMayNot is the answer to strangers, whether there is such a preview or not.
var errMayNot = errors.New("no such preview, or not for this visitor")

// admit says who comes to which preview.
func (h *Handler) admit(ctx context.Context, label, token string) (*request, error) {
	p, err := h.cfg.Store.PreviewByHost(ctx, label)
	if errors.Is(err, store.ErrNotFound) {
		return nil, errMayNot
	}
	if err != nil {
		return nil, err
	}
	v, err := h.access.Visitor(ctx, p.ID, token)
	if err != nil {
		return nil, err
	}
	may, err := h.access.May(ctx, p, v)
	if err == nil && !may {
		err = errMayNot
	}
	return &request{preview: p, visitor: v}, err
}

// visitToken is the token of a visit, if the request may be made with it: other sites, and the other previews among them, must not use a
// visitor's rights. They may lead a visitor here (a link).
func visitToken(r *http.Request) string {
	c, err := r.Cookie(visitCookie)
	if err != nil {
		return ""
	}
	get := r.Method == http.MethodGet || r.Method == http.MethodHead
	switch r.Header.Get("Sec-Fetch-Site") {
	case "same-origin", "none":
	case "":
		if o := r.Header.Get("Origin"); o != "" && o != "https://"+r.Host {
			return ""
		}
	default:
		if !get || r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document" {
			return ""
		}
	}
	return c.Value
}

// refuse sends a browser to where it says who it is, and has nothing for others.
func (h *Handler) refuse(w http.ResponseWriter, r *http.Request, label string) {
	w.Header().Set("Cache-Control", "no-store")
	page := r.Header.Get("Sec-Fetch-Mode") == "navigate" || strings.Contains(r.Header.Get("Accept"), "text/html")
	if r.Method != http.MethodGet || !page {
		http.Error(w, "There is no such preview, or you may not see it. Open it in a browser to log in.", http.StatusUnauthorized)
		return
	}
	state := secret.ID()
	if c, err := r.Cookie(stateCookie); err == nil && len(c.Value) == len(state) { // of another tab
		state = c.Value
	}
	http.SetCookie(w, hostCookie(stateCookie, state, stateLife))
	to := h.cfg.Base.JoinPath("/visit")
	to.RawQuery = url.Values{"host": {label}, "to": {r.URL.RequestURI()}, "state": {secret.Hash(state)}}.Encode()
	http.Redirect(w, r, to.String(), http.StatusSeeOther)
}

// enter takes the one-time ticket that the relay gave a browser for this host, and for nobody but this browser.
func (h *Handler) enter(w http.ResponseWriter, r *http.Request, label string) {
	w.Header().Set("Cache-Control", "no-store")
	w.Header().Set("Referrer-Policy", "no-referrer")
	q := r.URL.Query() // of a body nothing is read
	to := "https://" + r.Host + LocalPath(q.Get("to"))
	state, err := r.Cookie(stateCookie)
	if r.Method != http.MethodGet || err != nil {
		http.Redirect(w, r, to, http.StatusSeeOther) // where it begins anew
		return
	}
	token, err := h.redeem(r.Context(), label, q.Get("ticket"), state.Value)
	if err != nil && !errors.Is(err, store.ErrNotFound) {
		h.cfg.Log.Error("ticket not taken", "err", err)
		http.Error(w, "The relay has a problem of its own; try again.", http.StatusInternalServerError)
		return
	}
	if err == nil {
		http.SetCookie(w, hostCookie(visitCookie, token, VisitLife))
	}
	http.SetCookie(w, hostCookie(stateCookie, "", -1))
	http.Redirect(w, r, to, http.StatusSeeOther)
}

// redeem makes a visit of a ticket.
func (h *Handler) redeem(ctx context.Context, label, ticket, state string) (string, error) {
	p, err := h.cfg.Store.PreviewByHost(ctx, label)
	if err != nil {
		return "", err
	}
	t, err := h.cfg.Store.Redeem(ctx, store.Ticket, ticket)
	if err != nil {
		return "", err
	}
	wanted, password, _ := strings.Cut(t.Data, " ")
	if t.Subject != p.ID || !secret.Equal(wanted, secret.Hash(state)) {
		return "", store.ErrNotFound
	}
	visit := store.Token{Kind: store.Visit, Person: t.Person, Subject: p.ID, Parent: t.Parent, Data: password}
	if t.Parent != "" { // it ends with the login, and what is open with it
		login, err := h.cfg.Store.TokenByHash(ctx, store.Web, t.Parent)
		if err != nil {
			return "", err
		}
		visit.Expires = login.Expires
	}
	return h.cfg.Store.AddToken(ctx, visit, VisitLife)
}

// TicketURL is where a browser that has a ticket goes.
func TicketURL(base *url.URL, label, ticket, to string) string {
	u := *base
	u.Host, u.Path = label+"."+base.Host, enterPath
	u.RawQuery = url.Values{"ticket": {ticket}, "to": {to}}.Encode()
	return u.String()
}

// LocalPath is a target on the same host that somebody asked for, or "/".
func LocalPath(s string) string {
	u, err := url.Parse(s)
	if err != nil || u.Scheme != "" || u.Host != "" || u.Opaque != "" || !strings.HasPrefix(s, "/") || strings.HasPrefix(s, "//") || strings.ContainsAny(s, "\\\r\n") {
		return "/"
	}
	return s
}

func hostCookie(name, value string, life time.Duration) *http.Cookie {
	c := &http.Cookie{Name: name, Value: value, Path: "/", Secure: true, HttpOnly: true, SameSite: http.SameSiteLaxMode, MaxAge: int(life.Seconds())}
	if life < 0 {
		c.MaxAge = -1
	}
	return c
}
