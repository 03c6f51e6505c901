package relay

import (
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// device is a machine without a browser that asks to be logged in.
func (w *world) device(host string) (*laptop, relayapi.DeviceResult) {
	w.t.Helper()
	l := &laptop{w: w}
	var d relayapi.DeviceResult
	l.must(relayapi.PathDevice, relayapi.DeviceRequest{Host: host}, &d)
	return l, d
}

// asks is what the machine hears when it asks whether somebody has decided.
func (l *laptop) asks(device string) (int, relayapi.LoginResult) {
	l.w.t.Helper()
	var res relayapi.LoginResult
	status := l.call(relayapi.PathDeviceLogin, relayapi.DeviceLoginRequest{Device: device}, &res)
	return status, res
}

func TestDevice(t *testing.T) { onBoth(t, testDevice) }

func testDevice(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	ann := w.first("ann@example.com")
	l, d := w.device("build-7")
	if len(d.Code) != 9 || d.URL != "https://"+domain+"/device?code="+d.Code || d.For <= 0 || d.Every <= 0 {
		t.Fatalf("%+v", d)
	}
	if status, res := l.asks(d.Device); status != http.StatusOK || res.Token != "" {
		t.Fatalf("nobody has decided: %d %+v", status, res)
	}
	// The page is for people who are logged in, and leads back when they are.
	if a := w.browser().visit(d.URL); !strings.Contains(a.url, "/login?next="+url.QueryEscape("/device?code="+d.Code)) {
		t.Errorf("%v", a)
	}
	a := ann.visit(d.URL)
	for _, part := range []string{d.Code, "build-7", "ann@example.com", "127.0.0.1", "which is also yours", "sent you this link"} {
		if !strings.Contains(a.body, part) {
			t.Errorf("%q is missing in %v", part, a)
		}
	}
	// Who types the code need not care for its form.
	if b := ann.visit("https://" + domain + "/device?code=" + url.QueryEscape(" "+strings.ToLower(strings.ReplaceAll(d.Code, "-", "")))); !strings.Contains(b.body, "build-7") {
		t.Errorf("%v", b)
	}
	if b := ann.visit("https://" + domain + "/device"); b.status != http.StatusOK || !strings.Contains(b.body, "Code, as the machine shows it") {
		t.Errorf("%v", b)
	}
	if b := ann.submit("/device", url.Values{"code": {d.Code}, "allow": {"yes"}}); !strings.Contains(b.body, "is being logged in as ann@example.com") {
		t.Fatalf("%v", b)
	}
	status, res := l.asks(d.Device)
	if status != http.StatusOK || res.Who.Email != "ann@example.com" {
		t.Fatalf("%d %+v", status, res)
	}
	l.token = res.Token
	l.must(relayapi.PathListPreviews, struct{}{}, nil)
	// Both codes count once.
	if status, _ := l.asks(d.Device); status != http.StatusUnauthorized {
		t.Errorf("a second login: %d", status)
	}
	if b := ann.submit("/device", url.Values{"code": {d.Code}, "allow": {"yes"}}); b.status != http.StatusNotFound {
		t.Errorf("a second time: %v", b)
	}
}

// What a program does with its token it does as its maker, for as long as they may.
func TestAPIToken(t *testing.T) { onBoth(t, testAPIToken) }

func testAPIToken(t *testing.T, on func(*Config)) {
	w := newWorld(t, on)
	w.first("ann@example.com")
	bobB := w.member("bob@example.com", w.team(), store.Member)
	bob := bobB.login()
	for name, req := range map[string]relayapi.AddTokenRequest{
		"no name": {For: time.Hour}, "no time": {Name: "x"}, "too long": {Name: "x", For: relayapi.MaxTokenLife + 1}, "a long name": {Name: strings.Repeat("x", 101), For: time.Hour},
	} {
		if status := bob.call(relayapi.PathAddToken, req, nil); status != http.StatusBadRequest {
			t.Errorf("%s: %d", name, status)
		}
	}
	var made relayapi.Token
	bob.must(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "ci", For: time.Hour}, &made)
	if status := bob.call(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "ci", For: time.Hour}, nil); status != http.StatusConflict {
		t.Errorf("the name again: %d", status)
	}
	list := func() []relayapi.Token {
		var out relayapi.TokenList
		bob.must(relayapi.PathListTokens, struct{}{}, &out)
		return out.Tokens
	}
	if all := list(); len(all) != 1 || all[0].Name != "ci" || all[0].Used != nil || all[0].Token != "" || time.Until(all[0].Expires) > time.Hour {
		t.Errorf("%+v", all)
	}
	ci := &laptop{w: w, token: made.Token}
	var who relayapi.Who
	ci.must(relayapi.PathWho, struct{}{}, &who)
	if all := list(); who.Email != "bob@example.com" || all[0].Used == nil {
		t.Errorf("%+v %+v", who, all)
	}
	if status := ci.call(relayapi.PathAddCluster, relayapi.AddClusterRequest{Name: "prod"}, nil); status != http.StatusForbidden {
		t.Errorf("what its maker may not: %d", status)
	}
	bob.must(relayapi.PathDeleteToken, relayapi.DeleteTokenRequest{Name: "ci"}, nil)
	if status := ci.call(relayapi.PathWho, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("deleted: %d", status)
	}
	if status := bob.call(relayapi.PathDeleteToken, relayapi.DeleteTokenRequest{Name: "ci"}, nil); status != http.StatusNotFound {
		t.Errorf("deleted twice: %d", status)
	}
	bob.must(relayapi.PathAddToken, relayapi.AddTokenRequest{Name: "ci", For: time.Hour}, &made)
	ci.token = made.Token
	ci.must(relayapi.PathWho, struct{}{}, nil)
	p, err := w.relay.store.PersonByEmail(t.Context(), "bob@example.com")
	if err == nil {
		err = w.relay.store.SetDisabled(t.Context(), p.ID, true)
	}
	if err != nil {
		t.Fatal(err)
	}
	if status := ci.call(relayapi.PathWho, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("of a disabled account: %d", status)
	}
}

func TestAttackDevice(t *testing.T) {
	w := newWorld(t)
	ann := w.first("ann@example.com")
	bob := w.member("bob@example.com", w.team(), store.Member)

	// A link that somebody else has sent: the page says what, which machine and from where; refused, it is over for that machine.
	l, d := w.device("<b>evil</b>")
	if a := ann.visit(d.URL); !strings.Contains(a.body, "&lt;b&gt;evil&lt;/b&gt;") || !strings.Contains(a.body, `value="no"`) {
		t.Errorf("%v", a)
	}
	if status, res := l.asks(d.Device); status != http.StatusOK || res.Token != "" {
		t.Errorf("a page that was only looked at has logged in: %d", status)
	}
	if a := ann.submit("/device", url.Values{"code": {d.Code}, "allow": {"no"}}); !strings.Contains(a.body, "was not logged in") {
		t.Errorf("%v", a)
	}
	if status, _ := l.asks(d.Device); status != http.StatusUnauthorized {
		t.Errorf("after it was refused: %d", status)
	}

	// What one person has allowed nobody else can take over, or take back.
	l, d = w.device("laptop")
	ann.submit("/device", url.Values{"code": {d.Code}, "allow": {"yes"}})
	for _, allow := range []string{"yes", "no"} {
		if a := bob.submit("/device", url.Values{"code": {d.Code}, "allow": {allow}}); a.status != http.StatusNotFound {
			t.Errorf("%s: %v", allow, a)
		}
	}
	// Without the machine's own secret a code is worth nothing, nor is the secret another kind of token.
	for _, guess := range []string{d.Code, "", "doppel_device_" + strings.Repeat("A", 26)} {
		if status, _ := l.asks(guess); status != http.StatusUnauthorized {
			t.Errorf("%q: %d", guess, status)
		}
	}
	if status := (&laptop{w: w, token: d.Device}).call(relayapi.PathListPreviews, struct{}{}, nil); status != http.StatusUnauthorized {
		t.Errorf("the API with a machine's secret: %d", status)
	}
	// Whose account is disabled meanwhile lets nobody in.
	person, err := w.relay.store.PersonByEmail(t.Context(), "bob@example.com")
	if err != nil {
		t.Fatal(err)
	}
	l2, d2 := w.device("laptop")
	bob.submit("/device", url.Values{"code": {d2.Code}, "allow": {"yes"}})
	if err := w.relay.store.SetDisabled(t.Context(), person.ID, true); err != nil {
		t.Fatal(err)
	}
	if status, _ := l2.asks(d2.Device); status != http.StatusUnauthorized {
		t.Errorf("for a disabled account: %d", status)
	}
	if status, res := l.asks(d.Device); status != http.StatusOK || res.Who.Email != "ann@example.com" {
		t.Errorf("%d %+v", status, res)
	}

	// Asking, beginning and guessing are slow.
	_, d = w.device("fast")
	last := 0
	for range 3 {
		last, _ = l.asks(d.Device)
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("asking goes on: %d", last)
	}
	for range 12 {
		last = l.call(relayapi.PathDevice, relayapi.DeviceRequest{}, nil)
	}
	if last != http.StatusTooManyRequests {
		t.Errorf("beginning goes on: %d", last)
	}
	var a answer
	for range 12 {
		a = ann.submit("/device", url.Values{"code": {"BCDF-GHJK"}, "allow": {"yes"}})
	}
	if a.status != http.StatusTooManyRequests {
		t.Errorf("guessing goes on: %v", a)
	}
}
