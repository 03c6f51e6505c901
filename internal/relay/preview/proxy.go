package preview

import (
	"context"
	"errors"
	"html/template"
	"net"
	"net/http"
	"net/http/httputil"
	"strings"
	"sync/atomic"

	"github.com/doppel-dev/doppel/internal/match"
)

// of is what is known of the request that a context belongs to.
func of(ctx context.Context) *request {
	q, _ := ctx.Value(requestKey{}).(*request)
	return q
}

// rewrite makes of a visitor's request that of the cluster's ingress: nothing of ours is in it but the mark.
func rewrite(pr *httputil.ProxyRequest) {
	q := of(pr.In.Context())
	// Connections are kept by host, so each preview has its own, and a cluster that lies about one cannot get another's requests.
	pr.Out.URL.Scheme, pr.Out.URL.Host = "http", q.preview.ID+"."+q.preview.Cluster
	pr.Out.URL.RawQuery = pr.In.URL.RawQuery // as it was sent, whatever we would make of it
	pr.Out.Trailer = pr.In.Trailer           // not a copy: the server writes there what comes behind the body
	pr.Out.Host = q.preview.Authority
	if pr.Out.Host == "" {
		pr.Out.Host = pr.In.Host
	}
	for name := range pr.Out.Header {
		if strings.HasPrefix(name, "X-Doppel-") {
			delete(pr.Out.Header, name)
		}
	}
	pr.SetXForwarded()
	pr.Out.Header.Set(match.PreviewHeader, q.preview.ID)
	carry(pr.Out.Header, q.preview.Propagate, q.preview.ID)
	stripCookies(pr.Out.Header)
}

// stripCookies takes our cookies out of a request, and leaves others as they were written.
func stripCookies(h http.Header) {
	lines := h["Cookie"]
	h.Del("Cookie")
	for _, line := range lines {
		var kept []string
		for part := range strings.SplitSeq(line, ";") {
			if part = strings.TrimSpace(part); part != "" && !strings.HasPrefix(part, ourCookies) {
				kept = append(kept, part)
			}
		}
		if len(kept) > 0 {
			h.Add("Cookie", strings.Join(kept, "; "))
		}
	}
}

// clean keeps an app from what is not its: our cookies, and cookies for other hosts of the domain.
func clean(resp *http.Response) error {
	keepCookies(resp.Header)
	lines := resp.Header["Set-Cookie"]
	resp.Header.Del("Set-Cookie")
	for _, line := range lines {
		parts := strings.Split(line, ";")
		if strings.HasPrefix(strings.TrimSpace(parts[0]), ourCookies) {
			continue
		}
		kept := parts[:1]
		for _, p := range parts[1:] {
			name, _, _ := strings.Cut(strings.TrimSpace(p), "=")
			if !strings.EqualFold(strings.TrimSpace(name), "Domain") {
				kept = append(kept, p)
			}
		}
		resp.Header.Add("Set-Cookie", strings.Join(kept, ";"))
	}
	return nil
}

// keepCookies takes out of a request to clear what a browser has of a site what is not the app's alone: cookies go for all of the domain
// (Clear Site Data, section 3.1).
func keepCookies(h http.Header) {
	const name = "Clear-Site-Data"
	lines := h[name]
	h.Del(name)
	for _, line := range lines {
		var kept []string
		for what := range strings.SplitSeq(line, ",") {
			switch what = strings.TrimSpace(what); {
			case strings.Contains(what, "*"):
				kept = append(kept, `"cache"`, `"storage"`, `"executionContexts"`)
			case what != "" && !strings.Contains(strings.ToLower(what), "cookies"):
				kept = append(kept, what)
			}
		}
		if len(kept) > 0 {
			h.Add(name, strings.Join(kept, ", "))
		}
	}
}

// dial opens a connection for the preview of a request, to speak HTTP/1.1 on.
func (h *Handler) dial(ctx context.Context, _, addr string) (net.Conn, error) {
	c, _, err := h.reach(ctx, addr, false)
	return c, err
}

// reach connects to the ingress of the preview of a request; addr is what rewrite made of it.
func (h *Handler) reach(ctx context.Context, addr string, http2 bool) (_ net.Conn, proto string, err error) {
	host, _, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, "", err
	}
	id, cluster, _ := strings.Cut(host, ".")
	ctx, cancel := context.WithTimeout(ctx, dialTimeout)
	defer cancel()
	return h.cfg.Dial(ctx, cluster, id, http2)
}

// failed answers when the cluster does not.
func (h *Handler) failed(w http.ResponseWriter, r *http.Request, err error) {
	if r.Context().Err() != nil { // the visitor has gone, or may not be here any more
		panic(http.ErrAbortHandler)
	}
	var ne net.Error
	status, text := h.cfg.Explain(err)
	if errors.Is(err, errNotHTTP2) {
		status, text = http.StatusBadGateway, "The cluster's ingress does not speak HTTP/2 without TLS, which gRPC needs."
	}
	if status == 0 && errors.As(err, &ne) && ne.Timeout() {
		status, text = http.StatusGatewayTimeout, "The cluster did not answer in time."
	}
	if status == 0 {
		status, text = http.StatusBadGateway, "The cluster's answer broke off, or was none."
	}
	h.cfg.Log.Debug("preview not reached", "preview", of(r.Context()).preview.Host, "err", err)
	w.Header().Set("Cache-Control", "no-store")
	if of(r.Context()).grpc {
		failGRPC(w, of(r.Context()).deadline, text)
		return
	}
	if status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", "5")
	}
	if !strings.Contains(r.Header.Get("Accept"), "text/html") {
		http.Error(w, text, status)
		return
	}
	w.Header().Set("Content-Type", "text/html; charset=utf-8")
	w.Header().Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'")
	w.WriteHeader(status)
	_ = failure.Execute(w, text) // the visitor may have gone
}

var failure = template.Must(template.New("failure").Parse(`<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>Preview not available</title>
<style>:root{color-scheme:light dark;font:1rem/1.5 system-ui,sans-serif}body{max-width:36rem;margin:15vh auto;padding:0 1rem}</style></head>
<body><main><h1>This preview is not available now</h1><p>{{.}}</p></main></body></html>
`))

// recorder remembers the status of an answer.
type recorder struct {
	http.ResponseWriter
	status int
	slow   slow
	// whole says that the answer is one of gRPC's that is its trailers only: they are trailers only if the stream ends with them.
	whole atomic.Bool
}

// Unwrap gives http.ResponseController what is not here.
func (r *recorder) Unwrap() http.ResponseWriter { return r.ResponseWriter }

// FlushError lets http.ResponseController flush.
func (r *recorder) FlushError() error {
	if r.whole.Load() {
		return nil
	}
	return r.slow.write(http.NewResponseController(r.ResponseWriter).Flush)
}

// WriteHeader notes the final status (1xx come before it, 101 is one).
func (r *recorder) WriteHeader(status int) {
	if r.status == 0 && (status >= 200 || status == http.StatusSwitchingProtocols) {
		r.status = status
		r.whole.Store(r.Header().Get("Grpc-Status") != "" && isGRPC(r.Header()))
	}
	r.ResponseWriter.WriteHeader(status)
}

// Write notes that nobody said otherwise.
func (r *recorder) Write(b []byte) (n int, err error) {
	if r.status == 0 {
		r.status = http.StatusOK
	}
	err = r.slow.write(func() error { n, err = r.ResponseWriter.Write(b); return err })
	return n, err
}
