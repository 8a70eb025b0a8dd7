{{/*
What the programs are called with, all in one place. Nothing here depends on
values but the trust domain, the drain, the folders of CNI and kubelet, the
bundle endpoint and cert-manager.
*/}}
{{- define "signet.flags.control" -}}
- --kubernetes
- --namespace=$(POD_NAMESPACE)
- --listen=:9443
- --health-listen=:9440
- --admin-listen=127.0.0.1:9441
- --state-dir=/var/lib/signet
{{- with .Values.federation }}
{{- if or .spiffe.enabled .web.enabled }}
- --bundle-refresh-hint={{ .refreshHint }}
{{- end }}
{{- if .spiffe.enabled }}
- --bundle-listen=:8443
{{- end }}
{{- if .web.enabled }}
- --bundle-web-listen=:8444
- --web-certificate=/etc/signet/web/tls.crt
- --web-key=/etc/signet/web/tls.key
{{- with .web.oidcIssuer }}
- --oidc-issuer={{ . }}
{{- end }}
{{- end }}
{{- end }}
{{- with .Values.certManager }}
{{- if .enabled }}
- --cert-manager-issuer={{ required "certManager.issuerRef.name: name the issuer" .issuerRef.name }}
- --cert-manager-issuer-kind={{ .issuerRef.kind }}
- --cert-manager-issuer-group={{ .issuerRef.group }}
- --cert-manager-duration={{ .duration }}
- --cert-manager-mode={{ .mode }}
{{- with .workloadIssuerRef }}
{{- if .name }}
- --cert-manager-workload-issuer={{ .name }}
- --cert-manager-workload-issuer-kind={{ .kind }}
- --cert-manager-workload-issuer-group={{ .group }}
{{- end }}
{{- end }}
{{- if .roots }}
- --cert-manager-roots=/etc/signet/roots/roots.pem
{{- end }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "signet.flags.agent" -}}
- --kubernetes
- --node=$(NODE_NAME)
- --trust-domain={{ .Values.trustDomain }}
- --control=signet-control.$(POD_NAMESPACE).svc:9443
- --join-token=/var/run/secrets/signet/token
- --bundle-configmap=signet-bundle
- --state-dir=/var/lib/signet/agent
- --run-dir=/run/signet
- --health=:9446
{{- if .Values.csi.enabled }}
- --kubelet-dir={{ .Values.csi.kubeletDir }}
{{- end }}
{{- end -}}

{{- define "signet.flags.cni" -}}
- install
- --watch
- --bin-dir={{ .Values.cni.binDir }}
- --conf-dir={{ .Values.cni.confDir }}
- --own-namespace=$(POD_NAMESPACE)
- --daemonset=$(POD_NAMESPACE)/signet-agent
{{- end -}}

{{- define "signet.flags.proxy" -}}
- --run-dir=/run/signet
- --state-dir=/var/lib/signet/agent
- --node=$(NODE_NAME)
- --drain-limit={{ int .Values.proxy.drainSeconds }}s
{{- end -}}

{{/* Succeeds when this pod's Envoy serves what the agent told it. */}}
{{- define "signet.command.proxyReady" -}}
["/usr/bin/signet-proxy", "ready"]
{{- end -}}
