package acme

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/acme/acmetest"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relay/store/storetest"
)

func TestMain(m *testing.M) {
	code := m.Run()
	storetest.Stop()
	os.Exit(code)
}

const domain = "preview.example.test"

func open(t *testing.T, source string) *store.Store {
	t.Helper()
	s, err := store.Open(t.Context(), source)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func config(a *acmetest.Authority) Config {
	return Config{DNS: a.DNS.Addr, TSIG: a.DNS.KeyFile, Resolver: a.DNS.Addr, CA: a.URL, CARoots: a.RootsFile}
}

// manage is a relay's certificates; stop ends them.
func manage(t *testing.T, cfg Config, s *store.Store, every time.Duration) (c *Certificates, stop func()) {
	t.Helper()
	c, err := newCertificates(cfg, domain, s, slog.New(slog.NewTextHandler(t.Output(), nil)), every)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	if err := c.Manage(ctx); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceFunc(func() { cancel(); c.Close() })
	t.Cleanup(stop)
	return c, stop
}

// shown is what a client gets that asks for a name; nil: nothing.
func (c *Certificates) shown(name string) []*x509.Certificate {
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	go func() { _ = tls.Server(far, &tls.Config{GetCertificate: c.Get}).Handshake() }()
	client := tls.Client(near, &tls.Config{ServerName: name, InsecureSkipVerify: true})
	if client.Handshake() != nil {
		return nil
	}
	return client.ConnectionState().PeerCertificates
}

func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(40 * time.Second); !ok(); {
		if time.Now().After(end) {
			t.Fatalf("%s: not within 40 s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// An account that is only half made, as two certificates that are asked for at once find it, is made anew without an address that nobody has given.
func TestHalfAnAccount(t *testing.T) {
	t.Parallel()
	a := acmetest.New(t, "example.test", time.Hour)
	s := open(t, filepath.Join(t.TempDir(), "relay.db"))
	for range 2 {
		c, stop := manage(t, config(a), s, time.Hour)
		until(t, "certificates", func() bool { _, err := c.Expires(); return err == nil })
		stop()
		all, err := c.storage.List(t.Context(), "", true)
		if err != nil {
			t.Fatal(err)
		}
		halves := 0
		for _, key := range all {
			account := strings.Contains(key, "/users/") && strings.HasSuffix(key, ".json")
			if account {
				halves++
			}
			if account || strings.HasPrefix(key, "certificates/") {
				if err := c.storage.Delete(t.Context(), key); err != nil {
					t.Fatal(err)
				}
			}
		}
		if halves != 1 {
			t.Errorf("%d accounts in %q", halves, all)
		}
	}
}

// Two relays that share a database get one certificate for each name, with one account, and renew it before it ends. Whoever comes later has it at once.
func TestCertificate(t *testing.T) {
	t.Parallel()
	const life = 30 * time.Second
	a := acmetest.New(t, "example.test", life)
	db := storetest.Postgres(t)
	sa, sb := open(t, db), open(t, db)
	one, stopOne := manage(t, config(a), sa, time.Hour) // nothing is renewed yet, for which it may be time at once
	two, stopTwo := manage(t, config(a), sb, time.Hour)
	names := []string{domain, "brave-otter." + domain}
	has := func(c *Certificates) bool { _, err := c.Expires(); return err == nil }
	until(t, "certificates", func() bool { return has(one) && has(two) })
	var first []*x509.Certificate
	for _, name := range names {
		got := one.shown(name)
		if len(got) < 2 {
			t.Fatalf("%s: %d certificates", name, len(got))
		}
		between := x509.NewCertPool()
		between.AddCert(got[1])
		if _, err := got[0].Verify(x509.VerifyOptions{DNSName: name, Roots: a.Roots, Intermediates: between}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if !two.shown(name)[0].Equal(got[0]) {
			t.Errorf("%s: two relays show two certificates", name)
		}
		first = append(first, got[0])
	}
	if one.shown("other.test") != nil || one.shown("a.b."+domain) != nil {
		t.Error("a certificate for a name that is not the relay's")
	}
	if n := a.Orders.Load(); n != 2 {
		t.Errorf("%d orders for two names", n)
	}
	until(t, "records are removed", func() bool { return len(a.DNS.Records("_acme-challenge."+domain)) == 0 })
	stopTwo()
	stopOne()

	one, stopOne = manage(t, config(a), sa, 200*time.Millisecond)
	two, stopTwo = manage(t, config(a), sb, 200*time.Millisecond)
	until(t, "renewal at both", func() bool {
		for i, name := range names {
			if one.shown(name)[0].Equal(first[i]) || two.shown(name)[0].Equal(first[i]) {
				return false
			}
		}
		return true
	})
	if now := time.Now(); now.After(first[0].NotAfter) { // how long before is what the authority says (RFC 9773): this one, any time
		t.Errorf("renewed at %v, the first one ends at %v", now, first[0].NotAfter)
	}
	stopTwo()
	stopOne()
	if n := a.Orders.Load(); n < 4 || n > 6 { // on a slow machine it may have been time once more
		t.Errorf("%d orders for two names, renewed", n)
	}

	// Authority and DNS server are down: what is there is shown, at once.
	a.Down.Store(true)
	a.DNS.Refuse.Store(true)
	three, _ := manage(t, config(a), sa, time.Hour)
	for _, name := range names {
		if three.shown(name) == nil {
			t.Errorf("%s: no certificate while the authority is down", name)
		}
	}
	if got, err := sa.Files(t.Context(), "acme/acme"); err != nil || len(got) == 0 {
		t.Errorf("files %q, %v", got, err)
	}
}

// A program sets the records as well, where an alias leads too; it does not see the relay's secrets.
func TestProgram(t *testing.T) {
	a := acmetest.New(t, "example.test", time.Hour)
	t.Setenv("DOPPEL_RELAY_DATABASE", "secret")
	dir := t.TempDir()
	script := filepath.Join(dir, "hook")
	calls := filepath.Join(dir, "calls")
	if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\necho \"$1 $2 $3 $DOPPEL_RELAY_DATABASE\" >> %s\n", calls), 0o700); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { // the DNS provider's side of what the program does
		for ctx.Err() == nil {
			b, _ := os.ReadFile(calls)
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				a.DNS.Set(f[1], f[2], true)
			}
			time.Sleep(20 * time.Millisecond)
		}
	})
	defer wg.Wait()
	defer cancel()
	cfg := config(a)
	cfg.DNS, cfg.TSIG, cfg.Program = "", "", script
	c, stop := manage(t, cfg, open(t, filepath.Join(t.TempDir(), "relay.db")), time.Hour)
	until(t, "certificates", func() bool { _, err := c.Expires(); return err == nil })
	stop()
	b, err := os.ReadFile(calls)
	if got := string(b); err != nil || strings.Count(got, "present _acme-challenge."+domain+". ") != 2 || strings.Count(got, "cleanup _acme-challenge."+domain+". ") != 2 ||
		strings.Contains(got, "secret") {
		t.Errorf("%v\n%s", err, got)
	}
}

// What does not work is said with its reason, by the relay that goes on trying.
func TestProblems(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	write := func(name, text string) string {
		name = filepath.Join(dir, name)
		if err := os.WriteFile(name, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		return name
	}
	s := open(t, filepath.Join(dir, "relay.db"))
	for _, tt := range []struct {
		cfg  Config
		want string
	}{
		{Config{DNS: "x", Program: "y"}, "not both"},
		{Config{Program: "true", TSIG: "y"}, "TSIG key is for a DNS server"},
		{Config{DNS: "x", TSIG: dir + "/none"}, "no such file"},
		{Config{DNS: "x", TSIG: write("empty", "")}, "tsig-keygen"},
		{Config{DNS: "x", TSIG: write("md5", `key "a" { algorithm hmac-md5; secret "c2VjcmV0"; };`)}, "hmac-sha256"},
		{Config{DNS: "x", TSIG: write("bad", `key "a" { algorithm hmac-sha256; secret "not/base64!"; };`)}, "not base64"},
		{Config{Program: dir + "/none"}, "program for DNS records"},
		{Config{DNS: "x", CARoots: write("roots", "no")}, "no certificate in"},
	} {
		_, err := New(tt.cfg, domain, s, slog.New(slog.DiscardHandler))
		if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "not/base64!") {
			t.Errorf("%+v: %v, want %s", tt.cfg, err, tt.want)
		}
	}

	a := acmetest.New(t, "example.test", time.Hour)
	wrongKey := config(a)
	wrongKey.TSIG = write("wrong", `key "relay" { algorithm hmac-sha256; secret "b3RoZXI="; };`)
	failing := config(a)
	failing.DNS, failing.TSIG, failing.Program = "", "", write("fails", "#!/bin/sh\necho first; echo no such zone >&2; exit 3\n")
	down := config(a)
	down.CA = "https://127.0.0.1:1/dir"
	for name, tt := range map[string]struct {
		cfg  Config
		want string
	}{
		"wrong key": {wrongKey, a.DNS.Addr}, "program fails": {failing, "exit status 3: no such zone"}, "authority down": {down, "127.0.0.1:1"},
	} {
		c, stop := manage(t, tt.cfg, open(t, filepath.Join(t.TempDir(), "relay.db")), time.Hour)
		until(t, name, func() bool {
			_, err := c.Expires()
			return err != nil && strings.Contains(err.Error(), "yet: ")
		})
		if _, err := c.Expires(); !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", name, err, tt.want)
		}
		stop()
	}
}
