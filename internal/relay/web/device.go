package web

import (
	"encoding/json"
	"errors"
	"net/http"
	"net/url"
	"time"

	"github.com/doppel-dev/doppel/internal/relay/secret"
	"github.com/doppel-dev/doppel/internal/relay/store"
	"github.com/doppel-dev/doppel/internal/relayapi"
)

// A machine without a browser is logged in by the device flow (RFC 8628): it shows a code, and a person who opens the relay's page anywhere says
// that the machine with that code may act for them.

// How often a machine may ask whether somebody has decided, and how many may wait: strangers can begin to.
const (
	deviceEvery = 2 * time.Second
	maxDevices  = 1000
)

func (s *Site) deviceRoutes(mux *http.ServeMux) {
	mux.HandleFunc("POST "+relayapi.PathDevice, s.deviceStart)
	mux.HandleFunc("POST "+relayapi.PathDeviceLogin, s.deviceLogin)
	mux.Handle("GET "+relayapi.PathConfirm, s.private(s.devicePage))
	mux.Handle("POST "+relayapi.PathConfirm, s.private(s.confirmDevice))
}

// device is a machine that waits: what it says of itself, and where the relay has seen it.
type device struct {
	Host    string `json:"host"`
	Address string `json:"address"`
}

func (s *Site) deviceStart(w http.ResponseWriter, r *http.Request) {
	var req relayapi.DeviceRequest
	if !s.read(w, r, &req) {
		return
	}
	if !s.logins.allow(r.Context(), "device "+networkOf(r), addressBurst, addressEvery) {
		s.refuse(w, http.StatusTooManyRequests, "too many attempts; wait a little")
		return
	}
	if len(req.Host) > 128 {
		s.refuse(w, http.StatusBadRequest, "the machine's name is too long")
		return
	}
	waiting, err := s.cfg.Store.Tokens(r.Context(), store.Device, "", "")
	if err != nil {
		s.broken(w, r, err)
		return
	}
	if len(waiting) >= maxDevices {
		s.refuse(w, http.StatusServiceUnavailable, "too many machines wait to be logged in")
		return
	}
	data, err := json.Marshal(device{req.Host, clientOf(r)})
	if err != nil {
		s.broken(w, r, err)
		return
	}
	code := secret.Code()
	token, err := s.cfg.Store.AddToken(r.Context(), store.Token{Kind: store.Device, Subject: code, Data: string(data)}, deviceLife)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.answer(w, relayapi.DeviceResult{Device: token, Code: code, URL: s.link(relayapi.PathConfirm, url.Values{"code": {code}}), For: deviceLife, Every: deviceEvery})
}

// deviceLogin gives the machine its token when somebody has allowed that.
func (s *Site) deviceLogin(w http.ResponseWriter, r *http.Request) {
	var req relayapi.DeviceLoginRequest
	if !s.read(w, r, &req) {
		return
	}
	t, err := s.cfg.Store.Token(r.Context(), store.Device, req.Device)
	switch {
	case errors.Is(err, store.ErrNotFound):
		s.refuse(w, http.StatusUnauthorized, "the login was refused, or took too long")
		return
	case err != nil:
		s.broken(w, r, err)
		return
	case !s.logins.allow(r.Context(), "asking "+t.Hash, 2, deviceEvery):
		s.refuse(w, http.StatusTooManyRequests, "it was asked too often; wait a little")
		return
	case t.Person == "":
		s.answer(w, relayapi.LoginResult{})
		return
	}
	d, err := readDevice(t)
	if err != nil {
		s.broken(w, r, err)
		return
	}
	s.laptopLoggedIn(w, r, t, d.Host)
}

func readDevice(t store.Token) (d device, err error) { return d, json.Unmarshal([]byte(t.Data), &d) }

// deviceView is the page on which a person decides.
type deviceView struct {
	device
	Code  string
	Asked time.Time
	Here  bool // it was asked from the address that the person's browser has
}

// waiting finds the machine that waits with the code of a request; the answer is given if there is none.
func (s *Site) waiting(w http.ResponseWriter, r *http.Request) (store.Token, device, bool) {
	code := secret.ReadCode(r.FormValue("code"))
	if code == "" {
		problem := ""
		if r.FormValue("code") != "" {
			problem = "That is not a code: it has eight letters."
		}
		s.render(w, r, http.StatusOK, "device.html", "Log a machine in", deviceView{}, problem)
		return store.Token{}, device{}, false
	}
	if !s.logins.allow(r.Context(), "code of "+meOf(r).ID, addressBurst, addressEvery) {
		w.Header().Set("Retry-After", "10")
		s.render(w, r, http.StatusTooManyRequests, "device.html", "Log a machine in", deviceView{}, tooMany)
		return store.Token{}, device{}, false
	}
	found, err := s.cfg.Store.Tokens(r.Context(), store.Device, code, "")
	if err != nil {
		s.fail(w, r, err)
		return store.Token{}, device{}, false
	}
	if len(found) != 1 || found[0].Person != "" {
		s.refused(r, meOf(r).Email, "code of a machine")
		s.render(w, r, http.StatusNotFound, "device.html", "Log a machine in", deviceView{}, "No machine waits with that code, or no longer. Start again with doppel login.")
		return store.Token{}, device{}, false
	}
	d, err := readDevice(found[0])
	if err != nil {
		s.fail(w, r, err)
	}
	return found[0], d, err == nil
}

func (s *Site) devicePage(w http.ResponseWriter, r *http.Request) {
	if t, d, ok := s.waiting(w, r); ok {
		s.render(w, r, http.StatusOK, "device.html", "Log a machine in", deviceView{d, t.Subject, t.Created, d.Address == clientOf(r)}, "")
	}
}

func (s *Site) confirmDevice(w http.ResponseWriter, r *http.Request) {
	t, d, ok := s.waiting(w, r)
	if !ok {
		return
	}
	m := meOf(r)
	if r.PostFormValue("allow") != "yes" {
		if err := s.cfg.Store.Revoke(r.Context(), t.Hash); err != nil {
			s.fail(w, r, err)
			return
		}
		s.audit(r, m.Email, "machine refused", d.Host+" at "+d.Address)
		s.render(w, r, http.StatusOK, "message.html", "Refused", "The machine was not logged in.", "")
		return
	}
	if err := s.cfg.Store.Allow(r.Context(), m.Token, t.Hash, m.ID); err != nil {
		s.ended(w, r, err)
		return
	}
	s.audit(r, m.Email, "machine allowed", d.Host+" at "+d.Address)
	s.render(w, r, http.StatusOK, "message.html", "Allowed", "The machine is being logged in as "+m.Email+". You can close this page and go on in its terminal.", "")
}
