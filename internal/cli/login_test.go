package cli

import (
	"bytes"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relayapi"
)

// fakeRelay answers the relay's API; its authority is in the file.
func fakeRelay(t *testing.T, api map[string]func(r *http.Request) (int, any)) (relay, caFile string) {
	t.Helper()
	srv := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fn := api[r.URL.Path]
		if fn == nil {
			http.NotFound(w, r)
			return
		}
		status, v := fn(r)
		w.WriteHeader(status)
		_ = json.NewEncoder(w).Encode(v)
	}))
	t.Cleanup(srv.Close)
	caFile = filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(caFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	return srv.URL, caFile
}

// atHome gives doppel a home of its own, without a daemon and a browser.
func atHome(t *testing.T) (home string) {
	t.Helper()
	home = t.TempDir()
	for _, name := range []string{"HOME", "XDG_RUNTIME_DIR", "XDG_CONFIG_HOME", "XDG_STATE_HOME"} {
		t.Setenv(name, home)
	}
	for _, name := range []string{"DISPLAY", "WAYLAND_DISPLAY", "DOPPEL_CONFIG"} {
		t.Setenv(name, "")
	}
	return home
}

func doppel(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errOut bytes.Buffer
	code = run(t.Context(), args, Streams{In: strings.NewReader(""), Out: &out, Err: &errOut})
	return code, out.String(), errOut.String()
}

// Without a browser doppel login prints what can be opened elsewhere, and asks until the person has decided, whatever the relay says meanwhile.
func TestLoginElsewhere(t *testing.T) {
	home := atHome(t)
	var asked atomic.Int32
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathDevice: func(*http.Request) (int, any) {
			return 200, relayapi.DeviceResult{Device: "doppel_device_X", Code: "BCDF-GHJK", URL: "https://relay.test/device?code=BCDF-GHJK", For: time.Minute, Every: time.Millisecond}
		},
		relayapi.PathDeviceLogin: func(r *http.Request) (int, any) {
			var req relayapi.DeviceLoginRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Device != "doppel_device_X" {
				t.Errorf("%+v %v", req, err)
			}
			switch asked.Add(1) {
			case 1:
				return 200, relayapi.LoginResult{}
			case 2:
				return 429, relayapi.Problem{Error: "too often"}
			}
			return 200, relayapi.LoginResult{Token: "doppel_laptop_X", Who: relayapi.Who{Email: "ann@example.com"}}
		},
	})
	code, out, said := doppel(t, "login", relay, "--ca-file", ca)
	if code != 0 || out != "Login successful: ann@example.com at "+relay+"\n" {
		t.Errorf("%d %q", code, out)
	}
	if want := "Could not open browser, please access this URL:\n   https://relay.test/device?code=BCDF-GHJK\nIt can be opened on any machine, and shows the code BCDF-GHJK\n"; said != want {
		t.Errorf("%q, want %q", said, want)
	}
	b, err := os.ReadFile(filepath.Join(home, "doppel", "relays.json"))
	if err != nil || !strings.Contains(string(b), "doppel_laptop_X") {
		t.Errorf("%s %v", b, err)
	}
}

func TestLoginElsewhereRefused(t *testing.T) {
	atHome(t)
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathDevice:      func(*http.Request) (int, any) { return 200, relayapi.DeviceResult{For: time.Minute} },
		relayapi.PathDeviceLogin: func(*http.Request) (int, any) { return 401, relayapi.Problem{Error: "the login was refused"} },
	})
	if code, _, said := doppel(t, "login", relay, "--ca-file", ca); code != 3 || !strings.Contains(said, "error: relay "+relay+": the login was refused") {
		t.Errorf("%d %q", code, said)
	}
	relay, ca = fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathDevice:      func(*http.Request) (int, any) { return 200, relayapi.DeviceResult{For: time.Minute} },
		relayapi.PathDeviceLogin: func(*http.Request) (int, any) { return 200, relayapi.LoginResult{} },
	})
	if code, _, said := doppel(t, "login", relay, "--ca-file", ca, "--timeout", "300ms"); code != 3 || !strings.Contains(said, "nobody logged in within 300ms") {
		t.Errorf("%d %q", code, said)
	}
}

// The token of the environment is used without a login, for the relay that is named there and for no other, and is written nowhere.
func TestRelayToken(t *testing.T) {
	home := atHome(t)
	api := map[string]func(r *http.Request) (int, any){
		relayapi.PathWho: func(r *http.Request) (int, any) {
			if r.Header.Get("Authorization") != "Bearer doppel_api_X" {
				return 401, relayapi.Problem{Error: "not logged in, or no longer"}
			}
			return 200, relayapi.Who{Email: "ann@example.com"}
		},
		relayapi.PathListPreviews: func(r *http.Request) (int, any) {
			if r.Header.Get("Authorization") != "Bearer doppel_api_X" {
				return 401, relayapi.Problem{Error: "not logged in, or no longer"}
			}
			return 200, relayapi.PreviewList{}
		},
	}
	relay, ca := fakeRelay(t, api)
	t.Setenv("DOPPEL_RELAY_TOKEN", "doppel_api_X")
	if code, _, said := doppel(t, "preview", "list"); code != 2 || !strings.Contains(said, "not for which relay") {
		t.Errorf("%d %q", code, said)
	}
	t.Setenv("DOPPEL_RELAY_CA_FILE", ca)
	if code, _, said := doppel(t, "preview", "list", "--relay", relay); code != 2 { // what --relay says is not what the token is for
		t.Errorf("%d %q", code, said)
	}
	t.Setenv("DOPPEL_RELAY", relay)
	if code, out, said := doppel(t, "preview", "list"); code != 0 || out != "No previews at "+relay+"\n" {
		t.Errorf("%d %q %q", code, out, said)
	}
	if code, out, _ := doppel(t, "status"); code != 0 || !strings.Contains(out, "Relay      : ann@example.com at "+relay+", by DOPPEL_RELAY_TOKEN\n") {
		t.Errorf("%d %q", code, out)
	}
	if code, _, said := doppel(t, "preview", "list", "--relay", "https://other.test"); code != 3 || !strings.Contains(said, "DOPPEL_RELAY_TOKEN is for "+relay+", and not for https://other.test") {
		t.Errorf("%d %q", code, said)
	}
	if code, _, said := doppel(t, "relay", "token", "list"); code != 3 || !strings.Contains(said, "unset it") {
		t.Errorf("%d %q", code, said)
	}
	if code, _, said := doppel(t, "logout"); code != 2 || !strings.Contains(said, "this is no login") {
		t.Errorf("%d %q", code, said)
	}
	if _, err := os.Stat(filepath.Join(home, "doppel", "relays.json")); err == nil {
		t.Error("the token was written")
	}
	// The configuration may name the relay, too.
	t.Setenv("DOPPEL_RELAY", "")
	t.Setenv("DOPPEL_RELAY_CA_FILE", "")
	if err := os.MkdirAll(filepath.Join(home, "doppel"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(home, "doppel", "config.yaml"), []byte("relay: {url: "+relay+", caFile: "+ca+"}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if code, _, said := doppel(t, "preview", "list"); code != 0 {
		t.Errorf("%d %q", code, said)
	}
	t.Setenv("DOPPEL_RELAY_TOKEN", "doppel_api_Y")
	if code, out, _ := doppel(t, "status"); code != 0 || !strings.Contains(out, "Relay      : DOPPEL_RELAY_TOKEN: relay "+relay+": not logged in, or no longer\n") {
		t.Errorf("%d %q", code, out)
	}
}

func TestToken(t *testing.T) {
	home := atHome(t)
	used := time.Date(2026, 5, 1, 10, 0, 0, 0, time.UTC)
	relay, ca := fakeRelay(t, map[string]func(r *http.Request) (int, any){
		relayapi.PathAddToken: func(r *http.Request) (int, any) {
			var req relayapi.AddTokenRequest
			if err := json.NewDecoder(r.Body).Decode(&req); err != nil || req.Name != "ci" || req.For != 2*time.Hour {
				t.Errorf("%+v %v", req, err)
			}
			return 200, relayapi.Token{Name: req.Name, Token: "doppel_api_X", Expires: used}
		},
		relayapi.PathListTokens: func(*http.Request) (int, any) {
			return 200, relayapi.TokenList{Tokens: []relayapi.Token{{Name: "ci", Expires: used, Used: &used}, {Name: "nightly", Expires: used}}}
		},
		relayapi.PathDeleteToken: func(*http.Request) (int, any) { return 404, relayapi.Problem{Error: "no"} },
	})
	b, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	logins := map[string]any{"logins": []any{map[string]any{"url": relay, "token": "doppel_laptop_X", "ca": string(b)}}}
	file, err := json.Marshal(logins)
	if err == nil {
		err = os.Mkdir(filepath.Join(home, "doppel"), 0o700)
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(home, "doppel", "relays.json"), file, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	when := used.Local().Format("2006-01-02 15:04")
	if code, out, said := doppel(t, "relay", "token", "create", "ci", "--expires", "2h"); code != 0 ||
		out != "Token ci at "+relay+", until "+when+". It is shown once:\n  DOPPEL_RELAY="+relay+" DOPPEL_RELAY_TOKEN=doppel_api_X\n" {
		t.Errorf("%d %q %q", code, out, said)
	}
	if code, out, _ := doppel(t, "relay", "token", "list"); code != 0 || out != "ci: until "+when+", last used "+when+"\nnightly: until "+when+", never used\n" {
		t.Errorf("%d %q", code, out)
	}
	if code, _, said := doppel(t, "relay", "token", "delete", "x"); code != 1 || !strings.Contains(said, `no token "x"`) || !strings.Contains(said, "doppel relay token list") {
		t.Errorf("%d %q", code, said)
	}
}

// What is printed can be pasted, any number of times, and has the authority that the login knows.
func TestRelayAddCluster(t *testing.T) {
	atHome(t)
	relay, ca := fakeRelay(t, map[string]func(r *http.Request) (int, any){
		relayapi.PathAddCluster: func(*http.Request) (int, any) {
			return 200, relayapi.AddClusterResult{Name: "prod", Token: "doppel_link_X"}
		},
	})
	t.Setenv("DOPPEL_RELAY_TOKEN", "doppel_api_X")
	t.Setenv("DOPPEL_RELAY", relay)
	t.Setenv("DOPPEL_RELAY_CA_FILE", ca)
	b, err := os.ReadFile(ca)
	if err != nil {
		t.Fatal(err)
	}
	want := "prod is known to " + relay + ". Its traffic-manager joins with this token, which is shown once:\n" +
		"  kubectl create secret generic doppel-relay --namespace=doppel --from-literal=token=doppel_link_X --from-literal=ca.crt='" + strings.TrimSpace(string(b)) +
		"' --dry-run=client -o yaml | kubectl apply -f -\n  doppel helm upgrade --set relay.url=" + relay + "\n"
	if code, out, said := doppel(t, "relay", "add-cluster", "prod"); code != 0 || out != want {
		t.Errorf("%d %q %q, want %q", code, out, said, want)
	}
}

// What becomes of a preview's password is the relay's to say, unless it is to have another one or none.
func TestPublishPassword(t *testing.T) {
	atHome(t)
	var got relayapi.PublishRequest
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathPublishPreview: func(r *http.Request) (int, any) {
			got = relayapi.PublishRequest{}
			if err := json.NewDecoder(r.Body).Decode(&got); err != nil {
				t.Error(err)
			}
			return 200, relayapi.Preview{Public: true, Password: !got.NoPassword}
		},
	})
	t.Setenv("DOPPEL_RELAY_TOKEN", "doppel_api_X")
	t.Setenv("DOPPEL_RELAY", relay)
	t.Setenv("DOPPEL_RELAY_CA_FILE", ca)
	file := filepath.Join(t.TempDir(), "password")
	if err := os.WriteFile(file, []byte("open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		args []string
		want relayapi.PublishRequest
		says string
	}{
		{[]string{"--for", "2h"}, relayapi.PublishRequest{For: 2 * time.Hour}, "everybody who has the link and the password\n"},
		{[]string{"--password-file", file}, relayapi.PublishRequest{Password: "open sesame"}, "everybody who has the link and the password\n"},
		{[]string{"--no-password"}, relayapi.PublishRequest{NoPassword: true}, "everybody who has the link\n"},
	} {
		tt.want.Preview, tt.want.Public = "web", true
		if code, out, said := doppel(t, append([]string{"preview", "publish", "web"}, tt.args...)...); code != 0 || !strings.Contains(out, tt.says) || got != tt.want {
			t.Errorf("%q: %d %q %q, asked for %+v", tt.args, code, out, said, got)
		}
	}
	if code, _, said := doppel(t, "preview", "publish", "web", "--no-password", "--password-file", file); code != 2 || !strings.Contains(said, "contradict each other") {
		t.Errorf("both: %d %q", code, said)
	}
}

// Who logs in again ends the login that there was, at that relay alone, and is logged in whatever the relay makes of that.
func TestLoginAgain(t *testing.T) {
	home := atHome(t)
	var ended []string
	token, answer := "", 200
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathDevice: func(*http.Request) (int, any) {
			return 200, relayapi.DeviceResult{For: time.Minute, Every: time.Millisecond}
		},
		relayapi.PathDeviceLogin: func(*http.Request) (int, any) { return 200, relayapi.LoginResult{Token: token} },
		relayapi.PathLogout: func(r *http.Request) (int, any) {
			b, err := os.ReadFile(filepath.Join(home, "doppel", "relays.json"))
			if err != nil || !strings.Contains(string(b), token) {
				t.Errorf("ended before the new one was kept: %s %v", b, err)
			}
			ended = append(ended, r.Header.Get("Authorization"))
			return answer, relayapi.Problem{Error: "out of order"}
		},
	})
	for i, tt := range []struct {
		answer int
		said   string
	}{{200, ""}, {200, ""}, {401, ""}, {500, "warning: the relay was not told that a login has ended"}} {
		token, answer = fmt.Sprintf("doppel_laptop_%d", i), tt.answer
		code, out, said := doppel(t, "login", relay, "--ca-file", ca)
		if code != 0 || !strings.Contains(out, "Login successful") || strings.Contains(said, "warning") != (tt.said != "") || !strings.Contains(said, tt.said) {
			t.Errorf("%d: %d %q %q", i, code, out, said)
		}
	}
	if want := []string{"Bearer doppel_laptop_0", "Bearer doppel_laptop_1", "Bearer doppel_laptop_2"}; !slices.Equal(ended, want) {
		t.Errorf("ended %q, not %q", ended, want)
	}
	// A token of the environment is no login, and its maker's to end.
	ended = nil
	t.Setenv("DOPPEL_RELAY_TOKEN", "doppel_api_X")
	t.Setenv("DOPPEL_RELAY", relay)
	token = "doppel_laptop_9"
	if code, _, said := doppel(t, "login", relay, "--ca-file", ca); code != 0 || !slices.Equal(ended, []string{"Bearer doppel_laptop_3"}) {
		t.Errorf("%d %q, ended %q", code, said, ended)
	}
}

// How a cluster joins is said for the traffic-manager that the configuration names.
func TestAddClusterElsewhere(t *testing.T) {
	home := atHome(t)
	relay, ca := fakeRelay(t, map[string]func(*http.Request) (int, any){
		relayapi.PathAddCluster: func(*http.Request) (int, any) {
			return 200, relayapi.AddClusterResult{Name: "prod", Token: "doppel_cluster_X"}
		},
	})
	pem, err := os.ReadFile(ca)
	if err == nil {
		err = os.Mkdir(filepath.Join(home, "doppel"), 0o700)
	}
	var login []byte
	if err == nil {
		login, err = json.Marshal(map[string]any{"logins": []any{map[string]any{"url": relay, "token": "doppel_laptop_X", "ca": string(pem)}}})
	}
	if err == nil {
		err = os.WriteFile(filepath.Join(home, "doppel", "relays.json"), login, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	for config, want := range map[string][]string{
		"":                                     {" --namespace=doppel ", "  doppel helm upgrade --set relay.url="},
		"connect: {managerNamespace: tools}\n": {" --namespace=tools ", "  doppel helm upgrade --manager-namespace tools --set relay.url="},
	} {
		if err := os.WriteFile(filepath.Join(home, "doppel", "config.yaml"), []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		code, out, said := doppel(t, "relay", "add-cluster", "prod")
		if code != 0 || !strings.Contains(out, want[0]) || !strings.Contains(out, want[1]+relay+"\n") {
			t.Errorf("%q: %d %q %q", config, code, out, said)
		}
	}
}
