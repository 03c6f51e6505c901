{{- define "relay.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/part-of: doppel
app.kubernetes.io/version: {{ .Chart.AppVersion | replace "+" "_" | trunc 63 | quote }}
{{ include "relay.selector" . }}
{{- end }}

{{- define "relay.selector" -}}
app.kubernetes.io/name: doppel-relay
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- /* The image tag: build metadata ("+abc") is legal in a version and not in a tag. */ -}}
{{- define "relay.tag" -}}
{{ default (.Chart.AppVersion | replace "+" "_") .Values.image.tag }}
{{- end }}

{{- /* The claim of the volume for the database, if it is a file that stays. */ -}}
{{- define "relay.claim" -}}
{{- if and .Values.storage.persistent (not .Values.database.secretName) -}}
{{ default "data-doppel-relay-0" .Values.storage.existingClaim }}
{{- end -}}
{{- end }}

{{- define "relay.domain" -}}
{{ (urlParse .Values.url).hostname }}
{{- end }}

{{- /* Mistakes that the schema cannot see. */ -}}
{{- define "relay.check" -}}
{{- if ne (empty .Values.oidc.issuer) (empty .Values.oidc.clientID) }}
{{- fail "oidc: issuer and clientID go together" }}
{{- end }}
{{- if and (gt (int .Values.replicas) 1) (not .Values.database.secretName) }}
{{- fail "replicas: several relays need a database that they share (database.secretName)" }}
{{- end }}
{{- with .Values.tls }}
{{- if and $.Values.database.secretName (not .secretName) (not .acme.dns) }}
{{- fail "tls.secretName or tls.acme: relays that share a database need a certificate that they share" }}
{{- end }}
{{- if and .secretName .acme.dns }}
{{- fail "tls: a certificate from a Secret, or one that the relay gets itself (acme)" }}
{{- end }}
{{- if and .acme.tsigSecretName (not .acme.dns) }}
{{- fail "tls.acme.dns: the DNS server for the key tsigSecretName" }}
{{- end }}
{{- end }}
{{- end }}
