package cli

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/doppel-dev/doppel/internal/localapi"
	"github.com/doppel-dev/doppel/internal/relayapi"
	"github.com/doppel-dev/doppel/internal/relayclient"
	"github.com/doppel-dev/doppel/internal/uerr"
)

// defaultLoginTimeout is how long a person may take in the browser.
const defaultLoginTimeout = 5 * time.Minute

func (a *app) loginCmd() *cobra.Command {
	var ca string
	var noBrowser bool
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "login [URL]",
		Short: "Log this machine in at a relay, which shows previews of intercepts",
		Long: `Login opens the relay's page in a browser, where you say who you are and that this machine may act for you. On a machine without a browser
it prints an address that you can open anywhere, and a code that the page shows as well. What the machine gets is kept in relays.json beside the
configuration file, for you alone; the login that the machine had there ends. Without URL it is the relay of the connected cluster, or the last one.`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			relay := ""
			if len(args) > 0 {
				relay = args[0]
			}
			return a.loginRun(c.Context(), relay, ca, !noBrowser, timeout)
		},
	}
	c.Flags().StringVar(&ca, "ca-file", "", "certificate of the relay's own authority (PEM), if it is none that everybody knows")
	c.Flags().BoolVar(&noBrowser, "no-browser", false, "print an address to be opened on any machine, instead of opening a browser")
	c.Flags().DurationVar(&timeout, "timeout", defaultLoginTimeout, "how long to wait for the browser")
	return c
}

func (a *app) logins() (*relayclient.Logins, error) {
	return relayclient.Load(a.configFile, a.config.Relay.URL, a.config.Relay.CAFile)
}

// relayURL is the relay that is meant: the one named here, in the environment or in the configuration, that of the connected cluster, or the last one.
func (a *app) relayURL(ctx context.Context, named string, l *relayclient.Logins) (string, error) {
	if named != "" {
		return relayclient.URL(named)
	}
	if relay := l.Relay(); relay != "" {
		return relay, nil
	}
	var r localapi.RelayResult
	if err := a.client.Call(ctx, localapi.MethodRelay, localapi.RelayRequest{}, &r, nil); err == nil && r.URL != "" {
		return relayclient.URL(r.URL)
	}
	if login, ok := l.At(""); ok {
		return login.URL, nil
	}
	return "", uerr.New(uerr.Usage, "for example: doppel login https://preview.example.com", "which relay?")
}

func (a *app) loginRun(ctx context.Context, named, caFile string, open bool, timeout time.Duration) error {
	logins, err := a.logins()
	if err != nil {
		return err
	}
	relay, err := a.relayURL(ctx, named, logins)
	if err != nil {
		return err
	}
	login, _ := logins.At(relay)
	login.URL, login.Token, login.FromEnv = relay, "", false
	if caFile != "" {
		b, err := os.ReadFile(caFile)
		if err != nil {
			return uerr.Wrap(err, uerr.Usage, "", "read the relay's authority")
		}
		login.CA = string(b)
	}
	client, err := relayclient.New(login)
	if err != nil {
		return err
	}
	wait, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var res relayapi.LoginResult
	opened := false
	if open {
		opened, res, err = a.loginHere(wait, client, relay)
	}
	if !opened && err == nil {
		res, err = a.loginElsewhere(wait, client)
	}
	if err != nil && ctx.Err() == nil && errors.Is(wait.Err(), context.DeadlineExceeded) {
		return uerr.New(uerr.Denied, "try again", "nobody logged in within %s", timeout)
	}
	if err != nil {
		return err
	}
	login.Token, login.Who = res.Token, res.Who
	was, err := logins.Put(login)
	if err != nil {
		return err
	}
	a.endFormer(ctx, login, was)
	return a.print(res.Who, func(w io.Writer) { fmt.Fprintf(w, "Login successful: %s at %s\n", res.Who.Email, relay) })
}

// endFormer logs the login out in whose place another one is, which nobody has any more.
func (a *app) endFormer(ctx context.Context, login, was relayclient.Login) {
	if was.Token == "" || was.Token == login.Token {
		return
	}
	was.CA = login.CA // what the relay was just reached by
	client, err := relayclient.New(was)
	if err == nil {
		err = client.Call(ctx, relayapi.PathLogout, struct{}{}, nil)
	}
	a.warnNotEnded(err)
}

// warnNotEnded says why the relay was not told that a login has ended, if it was not.
func (a *app) warnNotEnded(err error) {
	if e := uerr.From(err); err != nil && e.Kind != uerr.Denied { // it did not count any more
		fmt.Fprintf(a.Err, "doppel: warning: the relay was not told that a login has ended: %s\n", oneLine(e.Msg))
	}
}

// loginHere has the user log in with a browser on this machine, which brings a code to a listener of ours. Only a browser that has our state is
// believed. It says whether there is a browser.
func (a *app) loginHere(ctx context.Context, client *relayclient.Client, relay string) (opened bool, res relayapi.LoginResult, err error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return false, res, err
	}
	verifier, state := rand.Text()+rand.Text(), rand.Text()
	challenge := sha256.Sum256([]byte(verifier))
	q := url.Values{
		"port": {fmt.Sprint(l.Addr().(*net.TCPAddr).Port)}, "challenge": {base64.RawURLEncoding.EncodeToString(challenge[:])},
		"state": {state}, "host": {hostname()},
	}
	got := make(chan string, 1)
	srv := &http.Server{ReadHeaderTimeout: 5 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		c := r.URL.Query().Get("code")
		if r.URL.Path != "/" || c == "" || r.URL.Query().Get("state") != state {
			http.NotFound(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Referrer-Policy", "no-referrer")
		fmt.Fprint(w, "<!doctype html><html lang=\"en\"><title>doppel</title><h1>This machine is being logged in</h1><p>You can close this page and go on in your terminal.</p>")
		select {
		case got <- c:
		default: // there was one already
		}
	})}
	go func() { _ = srv.Serve(l) }() // ends with Shutdown
	defer func() {
		sctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second) // lets the page out
		defer cancel()
		_ = srv.Shutdown(sctx)
	}()
	if openBrowser(ctx, relay+relayapi.PathAuthorize+"?"+q.Encode()) != nil {
		return false, res, nil
	}
	fmt.Fprintf(a.Err, "Your browser was opened at %s\n", relay)
	select {
	case code := <-got:
		err = client.Call(ctx, relayapi.PathLogin, relayapi.LoginRequest{Code: code, Verifier: verifier}, &res)
		return true, res, err
	case <-ctx.Done():
		return true, res, ctx.Err()
	}
}

// loginElsewhere has the user log in with a browser on any machine, and asks the relay whether they have (RFC 8628).
func (a *app) loginElsewhere(ctx context.Context, client *relayclient.Client) (res relayapi.LoginResult, err error) {
	var d relayapi.DeviceResult
	if err := client.Call(ctx, relayapi.PathDevice, relayapi.DeviceRequest{Host: hostname()}, &d); err != nil {
		return res, err
	}
	fmt.Fprintf(a.Err, "Could not open browser, please access this URL:\n   %s\nIt can be opened on any machine, and shows the code %s\n", d.URL, d.Code)
	ctx, cancel := context.WithTimeout(ctx, d.For)
	defer cancel()
	for every := max(d.Every, 100*time.Millisecond); ; {
		select {
		case <-time.After(every):
		case <-ctx.Done():
			if err == nil {
				err = ctx.Err()
			}
			return res, err
		}
		err = client.Call(ctx, relayapi.PathDeviceLogin, relayapi.DeviceLoginRequest{Device: d.Device}, &res)
		switch {
		case err == nil && res.Token != "":
			return res, nil
		case err == nil:
		case uerr.From(err).Kind == uerr.Denied:
			return res, err
		default: // it is away for a moment, or we ask too often (section 3.5)
			every += time.Second
		}
	}
}

// hostname is what a relay calls this machine.
func hostname() string {
	host, _ := os.Hostname()
	return host[:min(len(host), 64)]
}

func (a *app) logoutCmd() *cobra.Command {
	c := &cobra.Command{
		Use:   "logout [URL]",
		Short: "Log this machine out of a relay",
		Args:  cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			logins, err := a.logins()
			if err != nil {
				return err
			}
			relay := ""
			if len(args) > 0 {
				if relay, err = relayclient.URL(args[0]); err != nil {
					return err
				}
			}
			login, ok := logins.At(relay)
			if !ok {
				return uerr.New(uerr.NotFound, "", "not logged in%s", map[bool]string{true: " at " + relay}[relay != ""])
			}
			if login.FromEnv {
				return uerr.New(uerr.Usage, "unset it; its maker ends it with: doppel relay token delete", "this is no login, but the token in %s", relayclient.EnvToken)
			}
			client, err := relayclient.New(login)
			if err == nil {
				err = client.Call(c.Context(), relayapi.PathLogout, struct{}{}, nil)
			}
			a.warnNotEnded(err)
			if err := logins.Remove(login.URL); err != nil {
				return err
			}
			return a.print(localapi.Empty{}, func(w io.Writer) { fmt.Fprintf(w, "Logged out of %s\n", login.URL) })
		},
	}
	return c
}

// atRelay is the login at a relay, with a client for it.
func (a *app) atRelay(ctx context.Context, named string) (*relayclient.Logins, relayclient.Login, *relayclient.Client, error) {
	logins, err := a.logins()
	if err != nil {
		return nil, relayclient.Login{}, nil, err
	}
	relay, err := a.relayURL(ctx, named, logins)
	if err != nil {
		return nil, relayclient.Login{}, nil, err
	}
	login, ok := logins.At(relay)
	if other, _ := logins.At(""); !ok && other.FromEnv {
		return nil, login, nil, uerr.New(uerr.Denied, "have a token made there, and set "+relayclient.EnvRelay, "%s is for %s, and not for %s", relayclient.EnvToken, other.URL, relay)
	}
	if !ok {
		return nil, login, nil, uerr.New(uerr.Denied, "log in with: doppel login "+relay, "not logged in at %s", relay)
	}
	client, err := relayclient.New(login)
	return logins, login, client, err
}

// relayLine says who is logged in where, for status.
type relayLine struct {
	URL   string `json:"url"`
	Email string `json:"email"`
	// Token says that it is the token of the environment, and Problem what is wrong with that.
	Token   bool   `json:"token,omitempty"`
	Problem string `json:"problem,omitempty"`
}

// whoTimeout bounds how long status waits for the relay to say whose the token of the environment is.
const whoTimeout = 3 * time.Second

func (a *app) relayLines(ctx context.Context) []relayLine {
	logins, err := a.logins()
	if err != nil {
		return nil // login says what is wrong with the file
	}
	var out []relayLine
	for _, l := range logins.All() {
		line := relayLine{URL: l.URL, Email: cmp.Or(l.Who.Email, "?"), Token: l.FromEnv}
		if l.FromEnv {
			ctx, cancel := context.WithTimeout(ctx, whoTimeout)
			client, err := relayclient.New(l)
			if err == nil {
				var who relayapi.Who
				err = client.Call(ctx, relayapi.PathWho, struct{}{}, &who)
				line.Email = cmp.Or(who.Email, "?")
			}
			cancel()
			if err != nil {
				line.Problem = oneLine(uerr.From(err).Error())
			}
		}
		out = append(out, line)
	}
	return out
}

func (l relayLine) String() string {
	switch {
	case l.Problem != "":
		return relayclient.EnvToken + ": " + l.Problem
	case l.Token:
		return fmt.Sprintf("%s at %s, by %s", l.Email, l.URL, relayclient.EnvToken)
	}
	return fmt.Sprintf("logged in at %s as %s", l.URL, l.Email)
}
