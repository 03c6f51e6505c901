// Package web owns what the relay's own domain answers: accounts and logins, the dashboard, and the API for laptops.
package web

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"errors"
	"fmt"
	"html/template"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/access"
	"github.com/doppel-dev/doppel/internal/relay/links"
	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
)

// How long logins and invitations count.
const (
	webLife    = 14 * 24 * time.Hour
	laptopLife = 90 * 24 * time.Hour
	inviteLife = 7 * 24 * time.Hour
	setupLife  = 24 * time.Hour
	resetLife  = 24 * time.Hour
	codeLife   = 2 * time.Minute
	deviceLife = 10 * time.Minute
	ticketLife = time.Minute
)

// loginCookie is a browser's login. Only the relay's own host sees it, and no other can set it.
const loginCookie = "__Host-doppel"

// maxBody bounds what anybody may send to the relay itself, in bytes, and bodyTimeout how long that may take.
const (
	maxBody     = 64 << 10
	bodyTimeout = 30 * time.Second
)

// Config is what a Site needs.
type Config struct {
	Base      *url.URL
	CA        string // PEM of the relay's own authority; "": it has none
	Store     *store.Store
	Links     *links.Links
	Laptops   *links.Laptops
	Passwords *secret.Passwords
	OIDC      OIDC
	Log       *slog.Logger
}

// Site answers on the relay's own domain.
type Site struct {
	cfg     Config
	access  access.Access
	logins  *limiter
	live    *http.ServeMux // pages that are kept up to date
	streams streams
	oidc    *provider // nil: accounts have passwords
	handler http.Handler
}

//go:embed templates/*.html
var templateFiles embed.FS

//go:embed static/*
var staticFiles embed.FS

var pages = template.Must(template.New("").Funcs(template.FuncMap{
	"when": func(t time.Time) string { return t.UTC().Format("2006-01-02 15:04:05") },
	"took": func(d time.Duration) string {
		if d < time.Millisecond {
			return "< 1 ms"
		}
		return fmt.Sprintf("%d ms", d.Milliseconds())
	},
	"join": func(all []string) string { return strings.Join(all, ", ") },
	"count": func(n int, one, many string) string {
		if n == 1 {
			return "1 " + one
		}
		return fmt.Sprintf("%d %s", n, many)
	},
}).ParseFS(templateFiles, "templates/*.html"))

// New returns the site.
func New(cfg Config) *Site {
	s := &Site{cfg: cfg, access: access.Access{Store: cfg.Store}, logins: newLimiter(cfg.Store, cfg.Log), live: http.NewServeMux()}
	s.streams.ended, s.streams.byPerson = make(chan struct{}), map[string]int{}
	if cfg.OIDC.Issuer != "" {
		s.oidc = &provider{cfg: cfg.OIDC, redirect: cfg.Base.JoinPath("/oidc/callback").String(), client: &http.Client{Timeout: oidcTimeout}}
		if s.oidc.cfg.Name == "" {
			s.oidc.cfg.Name = "your identity provider"
		}
	}
	mux := http.NewServeMux()
	static, err := fs.Sub(staticFiles, "static")
	if err != nil {
		panic(err) // it is embedded
	}
	mux.Handle("GET /static/", http.StripPrefix("/static/", cached(http.FileServerFS(static))))
	s.accountRoutes(mux)
	if s.oidc == nil {
		s.passwordRoutes(mux)
	}
	s.laptopRoutes(mux)
	s.deviceRoutes(mux)
	s.visitRoutes(mux)
	s.dashboardRoutes(mux)
	s.apiRoutes(mux)
	// Sec-Fetch-Site or Origin has to say that a request which changes something comes from our own pages: the hosts of previews are the
	// same site to a browser, so that SameSite cookies do not tell.
	csrf := http.NewCrossOriginProtection()
	s.handler = http.MaxBytesHandler(headers(csrf.Handler(mux)), maxBody)
	return s
}

func (s *Site) ServeHTTP(w http.ResponseWriter, r *http.Request) { s.handler.ServeHTTP(w, r) }

// policy lets a page have our own style and script and nothing else; forms go to us, and to a laptop that logs in.
const policy = "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'; form-action "

func headers(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.ContentLength != 0 { // others, whose pages are kept up to date, stay as long as they like
			_ = http.NewResponseController(w).SetReadDeadline(time.Now().Add(bodyTimeout)) // connections here have deadlines
		}
		h := w.Header()
		h.Set("Content-Security-Policy", policy+"'self'")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Referrer-Policy", "no-referrer")
		h.Set("Cache-Control", "no-store")
		h.Set("Cross-Origin-Opener-Policy", "same-origin")
		h.Set("Cross-Origin-Resource-Policy", "same-origin")
		h.Set("Strict-Transport-Security", "max-age=31536000")
		next.ServeHTTP(w, r)
	})
}

func cached(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "public, max-age=3600")
		next.ServeHTTP(w, r)
	})
}

// assets is a part of the static files' URLs that changes with them.
var assets = func() string {
	h := sha256.New()
	_ = fs.WalkDir(staticFiles, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		b, err := staticFiles.ReadFile(path)
		h.Write(b)
		return err
	})
	return base64.RawURLEncoding.EncodeToString(h.Sum(nil)[:6])
}()

// page is what every template gets.
type page struct {
	Title  string
	Path   string
	Live   bool // it is kept up to date
	Me     *me
	Assets string
	Error  string
	OIDC   string // name of the identity provider; "": there is none
	Data   any
}

func (s *Site) render(w http.ResponseWriter, r *http.Request, status int, name, title string, data any, problem string) {
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.WriteHeader(status)
	p := page{Title: title, Path: r.URL.Path, Live: status == http.StatusOK && s.isLive(r), Me: meOf(r), Assets: assets, Error: problem, Data: data}
	if s.oidc != nil {
		p.OIDC = s.oidc.cfg.Name
	}
	if err := pages.ExecuteTemplate(w, name, p); err != nil {
		s.cfg.Log.Debug("page not written", "err", err)
	}
}

// leave leads to where another origin comes in. What answers a form is a page that goes on by itself, and not a redirect: browsers apply form-action
// to the redirects that follow a form, too (CSP3, section 6.4.1), and an identity provider's lead anywhere.
func (s *Site) leave(w http.ResponseWriter, r *http.Request, to string) {
	if r.Method != http.MethodPost {
		http.Redirect(w, r, to, http.StatusSeeOther)
		return
	}
	w.Header().Set("Refresh", "0; url="+to)
	s.render(w, r, http.StatusOK, "onward.html", "One moment", to, "")
}

// fail answers for a defect or an outage of ours, or too much to do.
func (s *Site) fail(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, secret.ErrBusy) {
		w.Header().Set("Retry-After", "5")
		s.render(w, r, http.StatusServiceUnavailable, "message.html", "Too much to do", sentence(err), "")
		return
	}
	s.cfg.Log.Error("request failed", "path", r.URL.Path, "err", err)
	s.render(w, r, http.StatusInternalServerError, "message.html", "Something went wrong", "The relay has a problem of its own. Try again in a moment.", "")
}

// missing answers for what is not there, or not for this person; which of the two is not told.
func (s *Site) missing(w http.ResponseWriter, r *http.Request) {
	s.render(w, r, http.StatusNotFound, "message.html", "Not found", "There is no such page, or it is not for you.", "")
}

// me is who is logged in.
type me struct {
	store.Person
	Token string // hash of the login
	Teams []store.Membership
}

// Admins are the teams that the person is an admin of.
func (m *me) Admins() []store.Team {
	var out []store.Team
	for _, t := range m.Teams {
		if t.Role == store.Admin {
			out = append(out, t.Team)
		}
	}
	return out
}

type meKey struct{}

func meOf(r *http.Request) *me {
	m, _ := r.Context().Value(meKey{}).(*me)
	return m
}

// sentence is an error of ours as a page says it.
func sentence(err error) string { return strings.ToUpper(err.Error()[:1]) + err.Error()[1:] + "." }

// who finds who a token belongs to; nil: nobody.
func (s *Site) who(ctx context.Context, kind store.Kind, token string) (*me, error) {
	if token == "" {
		return nil, nil
	}
	t, err := s.cfg.Store.Token(ctx, kind, token)
	if errors.Is(err, store.ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if kind == store.API {
		if err := s.cfg.Store.Use(ctx, t); err != nil {
			return nil, err
		}
	}
	m := &me{Token: t.Hash}
	if m.Person, err = s.cfg.Store.Person(ctx, t.Person); err != nil {
		return nil, err
	}
	m.Teams, err = s.cfg.Store.Memberships(ctx, t.Person)
	return m, err
}

// public is for pages that anybody may see; who is logged in is in the request's context.
func (s *Site) public(fn http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		m, err := s.login(r)
		if err != nil {
			s.fail(w, r, err)
			return
		}
		if m != nil {
			r = r.WithContext(context.WithValue(r.Context(), meKey{}, m))
		}
		fn(w, r)
	})
}

// login finds who has logged in with a request's browser; nil: nobody.
func (s *Site) login(r *http.Request) (*me, error) {
	c, err := r.Cookie(loginCookie)
	if err != nil {
		return nil, nil
	}
	return s.who(r.Context(), store.Web, c.Value)
}

// private is for pages of people who are logged in; others are sent to do that.
func (s *Site) private(fn http.HandlerFunc) http.Handler {
	return s.public(func(w http.ResponseWriter, r *http.Request) {
		if meOf(r) != nil {
			fn(w, r)
			return
		}
		to := "/"
		if r.Method == http.MethodGet {
			to = r.URL.RequestURI()
		}
		http.Redirect(w, r, "/login?"+url.Values{"next": {to}}.Encode(), http.StatusSeeOther)
	})
}

// ended answers for what could not be made by a login: it has ended meanwhile, and with it all that it would have led to.
func (s *Site) ended(w http.ResponseWriter, r *http.Request, err error) {
	if errors.Is(err, store.ErrNotFound) {
		http.Redirect(w, r, "/login", http.StatusSeeOther)
		return
	}
	s.fail(w, r, err)
}

// refused notes what somebody tried. It is not stored: strangers must not fill the database.
func (s *Site) refused(r *http.Request, who, detail string) {
	s.cfg.Log.Info("audit", "who", who[:min(len(who), 100)], "action", "login refused", "detail", detail, "peer", clientOf(r))
}

// audit notes what somebody has done.
func (s *Site) audit(r *http.Request, who, action, detail string) {
	s.cfg.Log.Info("audit", "who", who, "action", action, "detail", detail, "peer", clientOf(r))
	if err := s.cfg.Store.Audit(r.Context(), store.Audited{At: time.Now(), Who: who, Action: action, Detail: detail}); err != nil {
		s.cfg.Log.Error("audit not stored", "action", action, "err", err)
	}
}

func clientOf(r *http.Request) string {
	host, _, err := net.SplitHostPort(r.RemoteAddr)
	if err != nil {
		return r.RemoteAddr
	}
	return host
}
