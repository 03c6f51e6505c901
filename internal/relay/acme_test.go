package relay

import (
	"log/slog"
	"net/http"
	"net/http/httptest"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/acme"
	"github.com/doppel-dev/doppel/internal/relay/acme/acmetest"
)

// A relay without a certificate is not ready, and says why; one that has got one serves with it, whoever is down later.
func TestACME(t *testing.T) {
	a := acmetest.New(t, domain, 48*time.Hour)
	on := func(c *Config) {
		c.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
		c.ACME = acme.Config{DNS: a.DNS.Addr, TSIG: a.DNS.KeyFile, Resolver: a.DNS.Addr, CA: a.URL, CARoots: a.RootsFile}
	}
	dir := t.TempDir()
	w := &world{t: t, roots: a.Roots}
	health := func(path string) (int, string) {
		rec := httptest.NewRecorder()
		w.relay.health().ServeHTTP(rec, httptest.NewRequest(http.MethodGet, path, nil))
		return rec.Code, rec.Body.String()
	}
	ready := func() bool { status, _ := health("/readyz"); return status == http.StatusOK }
	expiry := func() string {
		_, all := health("/metrics")
		return regexp.MustCompile(`(?m)^doppel_relay_certificate_expiry_timestamp_seconds (\S+)$`).FindStringSubmatch(all)[1]
	}

	a.DNS.Refuse.Store(true)
	w.setup = w.start(dir, on)
	w.until("the reason", func() bool { _, why := health("/readyz"); return strings.Contains(why, "yet: ") })
	if status, why := health("/readyz"); status != http.StatusServiceUnavailable || !strings.Contains(why, domain) || expiry() != "0" {
		t.Errorf("%d %s, %s", status, why, expiry())
	}
	w.stop()

	a.DNS.Refuse.Store(false)
	w.start(dir, on)
	w.until("a certificate", ready)
	w.stop()

	a.Down.Store(true)
	a.DNS.Refuse.Store(true)
	w.setup = w.start(dir, on)
	if d := w.until("ready without its authority", ready); d > time.Second || expiry() == "0" {
		t.Errorf("ready after %v, %s", d, expiry())
	}
	first := w.first("ann@example.com")
	if got := first.visit("https://" + domain + "/"); got.status != http.StatusOK {
		t.Errorf("%v", got)
	}
	if got := w.browser().visit("https://brave-otter." + domain + "/"); !strings.Contains(got.url, "/login") {
		t.Errorf("%v", got)
	}
}
